"""The use of a finished run: evaluated again, exported, asked about images; nothing in it changes."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer

import run
from learners import evaluate
from learners.build import build_run
from learners.check import load_checked_config
from learners.export import load_exported
from learners.results import load_model
from tests import runs
from utils.checkpoint import METRICS, RunFolder
from utils.parallel import Parallel

POOLS = {"CODAPrompt": (), "DualPrompt": ("--prompt_param", 4, 4, 4), "L2P": ()}


@pytest.fixture(scope="module")
def folders(config, tmp_path_factory):
    """A finished run of each pool with the KD method that changes the student's input and output most."""
    root = tmp_path_factory.mktemp("runs")
    for pool, flags in POOLS.items():
        runs.finish(config, root / pool, "--learner_name", pool, "--KD_method", "KD_Token", *flags)
    return root


@pytest.fixture(scope="module")
def folder(folders):
    return folders / "CODAPrompt"


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


@pytest.fixture
def images(config):
    """Files of all test images."""
    return sorted((config.parent / "images/val").rglob("*.png"))


def on(folder, *flags) -> int:
    return run.main([str(word) for word in ("--log_dir", folder, "--gpuid", -1, *flags)])


class TestEvaluateOnly:
    def test_reproduces_the_matrices_and_writes_nothing(self, folder, capsys):
        """Settings that affect no result may differ."""
        before = runs.snapshot(folder)
        assert on(folder, "--eval_only", "--workers", 1, "--accumulate", 2, "--log_interval", 3) == 0
        out = capsys.readouterr().out
        assert "equal the recorded ones" in out and "Accuracy after task 2" in out
        assert runs.snapshot(folder) == before

    def test_copy_on_another_machine(self, copy, config, tmp_path, capsys):
        """Read-only, with data and weights elsewhere: paths and devices come from the command line."""
        elsewhere = shutil.copytree(config.parent, tmp_path / "elsewhere")
        flags = ["--dataroot", elsewhere / "images"]
        for role in ("teacher", "student"):
            flags += [f"--{role[0]}_weights", elsewhere / f"{role}.pth"]
        moved = config.parent.rename(config.parent.with_name("gone"))
        for path in [copy, *copy.rglob("*")]:
            path.chmod(path.stat().st_mode & ~0o222)
        try:
            assert on(copy, "--eval_only", *flags) == 0
        finally:
            moved.rename(config.parent)
            for path in [copy, *copy.rglob("*")]:
                path.chmod(path.stat().st_mode | 0o200)
        assert "equal the recorded ones" in capsys.readouterr().out

    def test_difference_is_reported(self, copy, capsys):
        recorded = json.loads((copy / METRICS).read_text())
        recorded["student"]["accuracy_matrix"][1][0] += 12.5
        (copy / METRICS).write_text(json.dumps(recorded))
        assert on(copy, "--eval_only") == 1
        assert "differ from the recorded ones by up to 12.50 points" in capsys.readouterr().out

    @pytest.mark.parametrize("name", ["models/task-1/T_class.pth", METRICS, "classes.json"])
    def test_damaged_file(self, name, copy, capsys):
        (copy / name).write_bytes((copy / name).read_bytes()[:-3])
        assert on(copy, "--eval_only") == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and f"{name} is damaged" in error

    def test_model_of_another_run_or_a_hostile_one(self, copy, folders, tmp_path, capsys):
        class Hostile:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "made"),)

        model = copy / "models/task-1/S_class.pth"
        shutil.copy(folders / "L2P/models/task-1/S_class.pth", model)
        assert on(copy, "--eval_only") == 2
        assert "S_class.pth does not fit the settings in args.yaml" in capsys.readouterr().err
        torch.save({"a": Hostile()}, model)
        assert on(copy, "--eval_only") == 2
        assert "S_class.pth" in capsys.readouterr().err and not (tmp_path / "made").exists()

    def test_nothing_learned_yet(self, copy, capsys):
        (copy / METRICS).unlink()
        assert on(copy, "--eval_only") == 2
        assert "holds no learned task yet" in capsys.readouterr().err


def student_logits(folder, files):
    """Images [B, 3, H, W] of the files, and the student's logits as evaluation computes them."""
    config = load_checked_config(["--eval_only", "--log_dir", str(folder), "--gpuid", "-1"])
    learner = build_run(config, Parallel(torch.device("cpu"))).learner
    learner.resume_task(1)
    for role in learner.roles:
        load_model(RunFolder(folder), role, 1, lambda state, role=role: learner.load_state(role, state))
    info = json.loads((folder / "classes.json").read_text())
    images = torch.cat([evaluate._load_image(file, info) for file in files])
    with torch.no_grad():
        return images, learner.eval_step().answer(images, 4)[1]["student"]


@pytest.mark.parametrize(
    ("action", "flags", "change"),
    [
        ("--eval_only", "--max_task 1", "max_task -1 -> 1"),
        ("--predict {image}", "--learner_name L2P --prompt_param 30 4 0", "learner_name CODAPrompt -> L2P"),
        ("--export {path}", "--kd_alpha 0", "kd_alpha 0.5 -> 0"),
    ],
)
def test_other_settings_are_refused(action, flags, change, folder, images, tmp_path, capsys):
    path = tmp_path / "student.safetensors"
    assert on(folder, *(word.format(image=images[0], path=path) for word in action.split()), *flags.split()) == 2
    error = capsys.readouterr().err
    assert change in error and "args.yaml has all settings" in error
    assert not path.exists()


class TestExport:
    @pytest.mark.parametrize("pool", POOLS)
    def test_safetensors_is_enough(self, pool, folders, images, tmp_path):
        path = tmp_path / "new/student.safetensors"
        before = runs.snapshot(folders / pool)
        for _ in range(2):  # an earlier export is replaced
            assert on(folders / pool, "--export", path) == 0
        assert runs.snapshot(folders / pool) == before
        pixels, expected = student_logits(folders / pool, images)
        with torch.no_grad():
            torch.testing.assert_close(load_exported(path)(pixels), expected, atol=1e-5, rtol=0)
        metadata = json.loads(path.with_suffix(".json").read_text())
        assert metadata["class_names"] == list(runs.CLASS_NAMES)
        assert sorted(file.name for file in path.parent.iterdir()) == ["student.json", "student.safetensors"]
        save_file({}, path, metadata={"description": json.dumps(metadata)})
        with pytest.raises(ValueError, match="is not an exported student: it lacks .*last"):
            load_exported(path)

    def test_program_runs_by_itself(self, folder, images, tmp_path):
        path = tmp_path / "student.pt2"
        assert on(folder, "--export", path) == 0
        program = torch.export.load(path).module()
        pixels, expected = student_logits(folder, images)
        for part in (slice(0, 12), slice(3, 4)):
            torch.testing.assert_close(program(pixels[part]), expected[part], atol=1e-5, rtol=0)

    def test_a_file_of_the_run_is_not_replaced(self, copy, capsys):
        before = runs.snapshot(copy)
        assert on(copy, "--export", copy / "classes.pt2") == 2
        assert ".json would be replaced" in capsys.readouterr().err
        assert runs.snapshot(copy) == before


def test_normalised_images(config, images, tmp_path, capsys, monkeypatch):
    """Recorded in args.yaml, refused when it changes, and part of the exported student."""
    own = {"mean": (0.2, 0.4, 0.6), "std": (0.5, 0.25, 0.2)}
    monkeypatch.setattr(VisionTransformer, "pretrained_cfg", own, raising=False)
    flags = ("--KD_method", "KD", "--schedule", 1)
    folder = runs.finish(config, tmp_path / "run", *flags, "--normalize", "model")
    assert on(folder, "--eval_only") == 0
    pixels, expected = student_logits(folder, images)
    monkeypatch.delattr(VisionTransformer, "pretrained_cfg")
    assert not torch.allclose(student_logits(folder, images)[1], expected)
    monkeypatch.setattr(VisionTransformer, "pretrained_cfg", own, raising=False)
    for name, load in (("s.safetensors", load_exported), ("s.pt2", lambda path: torch.export.load(path).module())):
        assert on(folder, "--export", tmp_path / name) == 0
        torch.testing.assert_close(load(tmp_path / name)(pixels), expected, atol=1e-5, rtol=0)
    assert run.main(runs.arguments(config, folder, *flags)) == 2
    assert "normalize model -> none" in capsys.readouterr().err
    assert run.main(runs.arguments(config, tmp_path / "other", *flags, "--teacher_from", folder)) == 2
    assert "normalize model there, none here" in capsys.readouterr().err


def test_prediction(folder, images, tmp_path, capsys):
    Image.fromarray(np.zeros((70, 131), np.uint8)).save(tmp_path / "grey.png")  # of another size and mode
    assert on(folder, "--predict", images[0], tmp_path / "grey.png", "--top", 3) == 0
    lines = capsys.readouterr().out.splitlines()
    start = lines.index(str(images[0]))
    assert lines[start + 4] == str(tmp_path / "grey.png")
    percents = [float(line.split()[0]) for line in lines[start + 1 : start + 4]]
    assert percents == sorted(percents, reverse=True) and 0 < sum(percents) <= 100.01
    assert all(line.split("%")[1].strip().startswith("class ") for line in lines[start + 1 : start + 4])
    assert on(folder, "--predict", images[0].parents[1], tmp_path) == 0
    named = [line for line in capsys.readouterr().out.splitlines() if line.endswith(".png")]
    assert len(named) == len(images) + 1 and named[-1] == str(tmp_path / "grey.png")
    (tmp_path / "grey.png").write_text("no image")
    (tmp_path / "empty").mkdir()
    for path in ("grey.png", "empty"):
        assert on(folder, "--predict", tmp_path / path) == 2
        assert "--predict" in capsys.readouterr().err
