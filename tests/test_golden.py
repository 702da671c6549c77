"""Every number recorded from the authors' implementation comes out again."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from models.prompts import coda
from tests.golden import LIMITS, check_case, compare, main

FOLDER = Path(__file__).parent / "golden_cases"
CASES = sorted(path.parent.name for path in FOLDER.glob("*/case.json"))
GROWTH = np.load(FOLDER / "gram_schmidt.npz")


def beyond(worst: dict[str, float]) -> set[str]:
    return {kind for kind, error in worst.items() if error > LIMITS[kind]}


def test_all_cases_are_there():
    assert len(CASES) == 9
    assert sum(path.stat().st_size for path in FOLDER.rglob("*")) < 3_000_000


@pytest.mark.parametrize("case", CASES)
def test_case(case):
    worst = check_case(FOLDER / case)
    assert set(worst) == set(LIMITS)
    assert not beyond(worst), worst


def test_outputs_have_the_recorded_keys_and_every_one_counts(tmp_path):
    """Written without expected.npz; a change of any single value beyond the limit is an error."""
    expected = dict(np.load(FOLDER / "l2p_kd/expected.npz"))
    shutil.copy(FOLDER / "common.npz", tmp_path)
    case = shutil.copytree(FOLDER / "l2p_kd", tmp_path / "l2p_kd", ignore=shutil.ignore_patterns("expected.npz"))
    assert main([str(case), "--outputs", str(tmp_path / "out")]) == 0
    outputs = dict(np.load(tmp_path / "out" / "l2p_kd.npz"))
    assert not beyond(compare(outputs, expected))
    for key in expected:
        wrong = outputs[key].astype(np.float64)
        wrong.flat[-1] += 2e-3 * (0.1 + abs(wrong.flat[-1]))
        assert len(beyond(compare(outputs | {key: wrong}, expected))) == 1, key
        missing = {other: value for other, value in outputs.items() if other != key}
        assert beyond(compare(missing, expected)), key


@pytest.mark.parametrize("prefix", sorted({key.rsplit("/", 1)[0] for key in GROWTH.files}))
def test_growth(prefix):
    before, draws, after = (torch.from_numpy(GROWTH[f"{prefix}/{key}"]) for key in ("before", "draws", "after"))
    per_task = len(before) // int(GROWTH[f"{prefix}/num_tasks"])
    start = int(GROWTH[f"{prefix}/task"]) * per_task
    grown = coda.gram_schmidt_growth(before, draws, start)
    assert len(draws) == per_task
    error = ((grown - after).abs() / (0.1 + after.abs())).max()
    assert error < 1e-5
    assert torch.equal(grown[:start], before[:start])
