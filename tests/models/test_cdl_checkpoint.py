"""Checkpoints in the format of the authors' implementation."""

from __future__ import annotations

import os

import pytest
import torch

from models.cdl_checkpoint import CheckpointError, find_checkpoint, fit_checkpoint, load_checkpoint
from tests.learners import small

TRAINED = {
    "prompt.e_p_0": torch.rand(3, 4, 8),
    "prompt.e_k_0": torch.rand(3, 6),
    "prompt.e_a_0": torch.rand(3, 6),
    "last.weight": torch.rand(5, 8),
    "last.bias": torch.rand(5),
}
KD = {"kd_last.weight": torch.rand(5, 8), "kd_prompt.kd_p_0": torch.rand(1, 8)}
FROZEN = {
    "feat.cls_token": torch.rand(1, 1, 8),
    "feat.blocks.0.attn.qkv.weight": torch.rand(24, 8),
    "s_feat.blocks.0.attn.qkv.weight": torch.rand(24, 8),
    "query.blocks.0.norm1.weight": torch.rand(8),
}


def save(folder, role: str, state) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / {"teacher": "T_class.pth", "student": "S_class.pth"}[role])


def assert_equal(one, other) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_backbones_and_prefixes_are_left_out(tmp_path, prefix):
    whole = TRAINED | KD | FROZEN
    save(tmp_path, "student", {prefix + key: value for key, value in whole.items()})
    assert_equal(load_checkpoint(tmp_path, "student"), TRAINED | KD)
    assert_equal(load_checkpoint(tmp_path / "S_class.pth", "student"), TRAINED | KD)
    assert_equal(load_checkpoint(tmp_path / "S_class.pth", "teacher"), TRAINED)


def test_the_last_task_counts(tmp_path):
    for task in (1, 9, 10):
        save(tmp_path / "run" / "models" / f"task-{task}", "teacher", TRAINED)
    (tmp_path / "run" / "models" / "task-best").mkdir()
    last = tmp_path / "run" / "models" / "task-10" / "T_class.pth"
    assert find_checkpoint(tmp_path / "run", "teacher") == last
    assert find_checkpoint(tmp_path / "run" / "models", "teacher") == last
    with pytest.raises(CheckpointError, match="holds no S_class.pth"):
        find_checkpoint(tmp_path / "run", "student")


class Code:
    def __reduce__(self):
        return os.getcwd, ()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (FROZEN, "no prompts and no head"),
        (KD, "no prompts and no head"),
        ({"epoch": 1}, "holds no tensors"),
        (TRAINED | {"x": Code()}, "could run code"),
        ([1], "damaged"),
    ],
)
def test_files_that_are_no_such_checkpoint(tmp_path, content, words):
    save(tmp_path, "student", content)
    with pytest.raises(CheckpointError, match=words) as error:
        load_checkpoint(tmp_path, "student")
    assert "S_class.pth" in str(error.value)


def test_damaged_file(tmp_path):
    (tmp_path / "T_class.pth").write_text("<html>")
    with pytest.raises(CheckpointError, match="damaged"):
        load_checkpoint(tmp_path, "teacher")


def test_the_parts_that_the_model_takes(tmp_path, caplog):
    assert_equal(fit_checkpoint(TRAINED | KD, TRAINED | KD, tmp_path), TRAINED | KD)
    assert not caplog.records
    assert_equal(fit_checkpoint(TRAINED | KD, TRAINED, tmp_path), TRAINED)
    assert "2 tensors of another KD method left out, such as kd_last.weight" in caplog.text
    for state, words in (
        (TRAINED, "2 tensors differ, such as kd_last.weight"),
        (TRAINED | KD | {"prompt.e_p_0": torch.rand(3, 2, 8)}, r"prompt.e_p_0, which is \(3, 2, 8\) in the file and \(3, 4, 8\) in the model"),
        (TRAINED | KD | {"prompt.g_p_0": torch.rand(2, 8)}, r"prompt.g_p_0, which is \(2, 8\) in the file and None in the model"),
    ):
        with pytest.raises(CheckpointError, match=words):
            fit_checkpoint(state, TRAINED | KD, tmp_path)


@pytest.mark.parametrize("kd_method", ["KD_Token", "FitNets", "ReviewKD"])
def test_our_checkpoints_have_that_format(tmp_path, kd_method):
    """A learner's files load into another one, which then answers the same."""
    trained = small.learner("CODAPrompt", kd_method, seed=1)
    fresh = small.learner("CODAPrompt", kd_method, seed=2)
    for role in ("teacher", "student"):
        save(tmp_path, role, {f"module.{key}": value for key, value in trained.state(role).items()} | FROZEN)
        state = fit_checkpoint(load_checkpoint(tmp_path, role), fresh.state(role), tmp_path)
        fresh.load_state(role, state)
    images, _ = small.batch_of(0)
    with torch.no_grad():
        one, other = (learner.eval_step().logits(images, 2) for learner in (trained, fresh))
    assert_equal(one, other)
