"""Every pair of learner and KD method through run.py, two tasks on a tiny data set."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from learners.distillers import DISTILLERS
from models.prompts import PROMPTS
from run import main

PROJECT = Path(__file__).resolve().parent.parent
PARAMS = {"CODAPrompt": "4 4 0.1", "DualPrompt": "2 4 2", "L2P": "5 2 1"}
LAYERS = {"run": 3, "learners": 2, "models": 1, "dataloaders": 1, "utils": 0}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Four classes with six training and two test images each."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for label in range(4):
        colour = rng.integers(0, 255, 3)
        for part, number in (("train", 6), ("val", 2)):
            folder = root / part / f"class {label}"
            folder.mkdir(parents=True)
            for index in range(number):
                pixels = np.clip(colour + rng.normal(0, 40, (64, 64, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
    return root


def arguments(images: Path, log_dir: Path, learner: str, method: str) -> list[str]:
    text = (
        f"--dataset ImageFolder --first_split_size 2 --other_split_size 2 --schedule 1 --batch_size 4 --workers 0 "
        f"--t_model mini_vit_base --s_model mini_vit_small --kd_prompt_param 3 2 --no_progress --gpuid -1 "
        f"--learner_name {learner} --prompt_param {PARAMS[learner]} --KD_method {method}"
    )
    return [*text.split(), "--dataroot", str(images), "--log_dir", str(log_dir)]


@pytest.mark.parametrize("method", list(DISTILLERS))
@pytest.mark.parametrize("learner", list(PROMPTS))
def test_every_pair_runs_and_leaves_its_files(images, tmp_path, learner, method):
    assert main(arguments(images, tmp_path / "run", learner, method)) == 0
    root = tmp_path / "run"
    roles = ["S", "T"] if DISTILLERS[method].needs_teacher else ["S"]
    expected = {"args.yaml", "output.log", "Results/acc_s.csv", "Results/metrics.json", "Results/timing.json"}
    expected |= {f"models/task-{task}/{role}_class.pth" for task in (1, 2) for role in roles}
    expected |= {"Results/acc.csv"} if "T" in roles else set()
    files = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
    assert expected <= files
    assert ("Results/acc.csv" in files) == ("T" in roles)
    metrics = json.loads((root / "Results/metrics.json").read_text())
    assert metrics["complete"] and len(metrics["student"]["accuracy_matrix"]) == 2
    lines = (root / "output.log").read_text().splitlines()
    assert "===Summary of student experiment===" in lines[-3]
    assert "Acc | mean: " in lines[-2] and "Forgetting: " in lines[-1]


def test_the_same_seed_gives_the_same_bytes(images, tmp_path):
    for name in ("a", "b"):
        assert main(arguments(images, tmp_path / name, "CODAPrompt", "KD_Token")) == 0
    names = [p.relative_to(tmp_path / "a") for pattern in ("*.csv", "*metrics.json", "*.pth", "*.png")
             for p in (tmp_path / "a").rglob(pattern)]  # fmt: skip
    assert len(names) >= 10
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_a_finished_run_says_so_and_evaluates_to_the_same_matrix(images, tmp_path, caplog):
    flags = arguments(images, tmp_path / "run", "DualPrompt", "KD_Token")
    assert main(flags) == 0
    before = (tmp_path / "run" / "Results" / "metrics.json").read_bytes()
    caplog.clear()
    assert main(flags) == 0
    assert "finished" in caplog.text and "Task 1/2" not in caplog.text
    assert main(["--eval_only", "--log_dir", str(tmp_path / "run"), "--gpuid", "-1"]) == 0  # 1 where they differ
    assert (tmp_path / "run" / "Results" / "metrics.json").read_bytes() == before


def imported(path: Path) -> set[str]:
    """Top-level packages that a file imports, also within functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


def test_imports_go_one_way():
    for package, layer in LAYERS.items():
        files = [PROJECT / "run.py"] if package == "run" else list((PROJECT / package).rglob("*.py"))
        assert files
        for path in files:
            for name in imported(path) & LAYERS.keys() - {package}:
                assert LAYERS[name] < layer, f"{path.relative_to(PROJECT)} imports {name}"
