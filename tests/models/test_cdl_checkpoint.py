"""Checkpoints in the format of the authors' implementation."""

import pytest
import torch

from models.cdl_checkpoint import FILES, find_checkpoint, fit_checkpoint, load_checkpoint
from utils.config import ConfigError

TRAINED = {"prompt.e_p_0": torch.rand(3, 4, 8), "last.weight": torch.rand(5, 8), "last.bias": torch.rand(5)}
KD = {"kd_last.weight": torch.rand(5, 8), "kd_prompt.kd_p_0": torch.rand(1, 8)}
FROZEN = {
    "feat.blocks.0.attn.qkv.weight": torch.rand(24, 8),
    "s_feat.cls_token": torch.rand(1, 1, 8),
    "query.norm.weight": torch.rand(8),
    "prompt.k_layer_proj0.weight": torch.rand(2, 2),
    "prompt.v_layer_proj11.bias": torch.rand(2),
    "clf_norm.weight": torch.rand(8),
}


def save(folder, role: str, state) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / FILES[role])


def assert_equal(one, other) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_backbones_and_prefixes_are_left_out(tmp_path, prefix):
    save(tmp_path, "student", {prefix + key: value for key, value in (TRAINED | KD | FROZEN).items()})
    assert_equal(load_checkpoint(tmp_path, "student"), TRAINED | KD)
    assert_equal(load_checkpoint(tmp_path / "S_class.pth", "student"), TRAINED | KD)
    assert_equal(load_checkpoint(tmp_path / "S_class.pth", "teacher"), TRAINED)


def test_the_last_task_counts(tmp_path):
    models = tmp_path / "run" / "models"
    for task in ("1", "9", "10", "best"):
        save(models / f"task-{task}", "teacher", TRAINED)
    for path in (tmp_path / "run", models, models / "task-10"):
        assert find_checkpoint(path, "teacher") == models / "task-10" / "T_class.pth"
    with pytest.raises(ConfigError, match="holds no S_class.pth"):
        find_checkpoint(tmp_path / "run", "student")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (FROZEN, "no prompts and no head"),
        (KD, "no prompts and no head"),
        ({"epoch": 1}, "holds no tensors"),
        (TRAINED | {"x": ConfigError("")}, "could run code"),
    ],
)
def test_other_files(tmp_path, content, words):
    save(tmp_path, "student", content)
    with pytest.raises(ConfigError, match=f"S_class.pth .*{words}"):
        load_checkpoint(tmp_path, "student")


def test_parts_that_the_model_has(tmp_path, caplog):
    assert_equal(fit_checkpoint(TRAINED | KD, TRAINED | KD, tmp_path), TRAINED | KD)
    assert not caplog.records
    assert_equal(fit_checkpoint(TRAINED | KD, TRAINED, tmp_path), TRAINED)
    assert "kd_last.weight, kd_prompt.kd_p_0 of another KD method left out" in caplog.text
    for state, words in (
        (TRAINED, "it lacks kd_last.weight"),
        (TRAINED | KD | {"last.bias": torch.rand(6)}, r"last.bias has shape \(6,\), not \(5,\)"),
        (TRAINED | KD | {"last.bias": torch.rand(5) + 1j}, "last.bias holds torch.complex64"),
        (TRAINED | KD | {"prompt.g_p_0": torch.rand(2, 8)}, "the model has no prompt.g_p_0"),
    ):
        with pytest.raises(ConfigError, match=words):
            fit_checkpoint(state, TRAINED | KD, tmp_path)
