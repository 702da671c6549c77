"""A finished run is used: evaluated again, exported, asked about images; nothing in it changes."""

import contextlib
import json
import os
import shutil
import stat

import numpy as np
import pytest
import torch
from PIL import Image

import run
from dataloaders.loader import DataPipeline
from learners import actions, assemble
from learners.check import load_checked_config
from learners.export import load_exported
from tests import runs
from utils.checkpoint import RunFolder, RunFolderError

POOLS = {"CODAPrompt": (), "DualPrompt": ("--prompt_param", 4, 4, 4), "L2P": ()}


@pytest.fixture(scope="module")
def folders(config, tmp_path_factory):
    """A finished run of each pool with the KD method that changes the student's input and output most."""
    root = tmp_path_factory.mktemp("runs")
    with runs.quick():
        for pool, flags in POOLS.items():
            argv = runs.arguments(config, root / pool, "--learner_name", pool, "--KD_method", "KD_Token", *flags)
            assert run.main(argv) == 0
    return root


@pytest.fixture(scope="module")
def folder(folders):
    return folders / "CODAPrompt"


def on(folder, *flags) -> int:
    return run.main([str(word) for word in ("--log_dir", folder, "--gpuid", -1, *flags)])


@pytest.fixture
def images(config):
    """All test images of the run, [12, 3, 16, 16] in [0, 1], and their files."""
    files = sorted((config.parent / "images/val").rglob("*.png"))
    return files


class TestEvaluateOnly:
    def test_reproduces_the_matrices_and_writes_nothing(self, folder, capsys):
        before = runs.snapshot(folder)
        assert on(folder, "--eval_only") == 0
        out = capsys.readouterr().out
        assert "equal the recorded ones" in out and "Accuracy after task 2" in out
        assert runs.snapshot(folder) == before

    def test_copy_on_another_machine(self, folder, config, tmp_path, capsys):
        """Read-only, with data and weights elsewhere: paths and devices come from the command line."""
        copy = shutil.copytree(folder, tmp_path / "copy")
        data = shutil.copytree(config.parent / "images", tmp_path / "data")
        weights = shutil.copytree(config.parent, tmp_path / "weights")
        text = (copy / "args.yaml").read_text()
        assert str(config.parent) in text
        moved = config.parent.rename(config.parent.with_name("gone"))
        for path in [copy, *copy.rglob("*")]:
            path.chmod(path.stat().st_mode & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))
        try:
            flags = ("--dataroot", data, "--t_weights", weights / "teacher.pth", "--s_weights", weights / "student.pth")
            assert on(copy, "--eval_only", *flags, "--workers", 1) == 0
        finally:
            moved.rename(config.parent)
            for path in [copy, *copy.rglob("*")]:
                path.chmod(path.stat().st_mode | stat.S_IWUSR)
        assert "equal the recorded ones" in capsys.readouterr().out

    def test_run_that_was_killed_between_manifest_and_moves(self, folder, tmp_path, capsys):
        copy = shutil.copytree(folder, tmp_path / "copy")
        for name in ("models/task-2/S_class.pth", "Results/metrics.json"):
            path = copy / name
            path.rename(path.with_name(f".{path.name}.unfinished"))
        before = runs.snapshot(copy)
        assert on(copy, "--eval_only") == 0
        assert runs.snapshot(copy) == before

    def test_difference_is_said(self, folder, capsys, monkeypatch):
        recorded = json.loads((folder / "Results/metrics.json").read_text())
        recorded["student"]["accuracy_matrix"][1][0] += 12.5
        real = RunFolder.read
        monkeypatch.setattr(
            RunFolder, "read",
            lambda self, name: json.dumps(recorded).encode() if name.endswith("metrics.json") else real(self, name),
        )  # fmt: skip
        assert on(folder, "--eval_only") == 1
        assert "differ from the recorded ones by up to 12.50 points" in capsys.readouterr().out

    @pytest.mark.parametrize("name", ["models/task-1/T_class.pth", "Results/metrics.json", "classes.json"])
    def test_damaged_file(self, name, folder, tmp_path, capsys):
        copy = shutil.copytree(folder, tmp_path / "copy")
        (copy / name).write_bytes((copy / name).read_bytes()[:-1])
        assert on(copy, "--eval_only") == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and f"{name} is damaged" in error

    def test_file_of_another_run_in_its_place(self, folder, folders, tmp_path, capsys):
        """Even with a manifest made for it: what does not fit the settings is refused, and no code is run."""
        copy = shutil.copytree(folder, tmp_path / "copy")
        opened = RunFolder(copy)
        opened.open()
        opened.commit({"models/task-1/S_class.pth": (folders / "L2P/models/task-1/S_class.pth").read_bytes()})
        assert on(copy, "--eval_only") == 2
        assert "S_class.pth does not fit the settings in args.yaml" in capsys.readouterr().err

    def test_hostile_file(self, folder, tmp_path, capsys):
        class Hostile:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "made"),)

        copy = shutil.copytree(folder, tmp_path / "copy")
        opened = RunFolder(copy)
        opened.open()
        torch.save({"a": Hostile()}, tmp_path / "hostile")
        opened.commit({"models/task-1/S_class.pth": (tmp_path / "hostile").read_bytes()})
        assert on(copy, "--eval_only") == 2
        assert "S_class.pth" in capsys.readouterr().err and not (tmp_path / "made").exists()

    def test_nothing_learned_yet(self, folder, tmp_path, capsys):
        copy = tmp_path / "copy"
        opened = RunFolder(copy)
        opened.commit({name: (folder / name).read_bytes() for name in ("args.yaml", "classes.json")})
        assert on(copy, "--eval_only") == 2
        assert "holds no learned task yet" in capsys.readouterr().err


@contextlib.contextmanager
def trained(folder):
    """The parts of a run with its models as they were after the second task."""
    config = load_checked_config(["--eval_only", "--log_dir", str(folder), "--gpuid", "-1"])
    with assemble.assemble(config) as parts:
        opened = RunFolder(folder)
        opened.open(read_only=True)
        actions.load_task(parts.learner, opened, 1, parts.learner.phases)
        yield parts


class TestIndependence:
    def predictions(self, parts, **options):
        """Logits of both models for all test images."""
        step, logits = parts.learner.eval_step(), []
        data = DataPipeline(parts.stream, batch_size=4, **options)
        try:
            for task in range(2):
                for images, _ in data.test(task):
                    logits.append(step.logits(images, 4))
        finally:
            data.close()
        return {role: torch.cat([batch[role] for batch in logits]) for role in ("teacher", "student")}

    def test_batch_size_and_workers(self, folder):
        with trained(folder) as parts:
            expected = self.predictions(parts, eval_batch_size=64)
            assert expected["student"].shape == (12, 4)
            for options in ({"eval_batch_size": 1}, {"eval_batch_size": 7}, {"eval_batch_size": 5, "workers": 2}):
                found = self.predictions(parts, **options)
                for role in expected:
                    torch.testing.assert_close(found[role], expected[role], atol=1e-5, rtol=1e-5)
                    assert torch.equal(found[role].argmax(1), expected[role].argmax(1))


class TestOtherSettings:
    @pytest.mark.parametrize("action", [["--eval_only"], ["--predict", "{image}"], ["--export", "{path}"]])
    @pytest.mark.parametrize("flags, change", [
        (["--kd_alpha", "0"], "kd_alpha 0.5 -> 0"), (["--max_task", "1"], "max_task -1 -> 1"),
        (["--learner_name", "L2P", "--prompt_param", "30", "4", "0"], "learner_name CODAPrompt -> L2P"),
    ])  # fmt: skip
    def test_refused(self, action, flags, change, folder, images, tmp_path, capsys):
        path = tmp_path / "student.safetensors"
        action = [word.format(image=images[0], path=path) for word in action]
        assert on(folder, *action, *flags) == 2
        error = capsys.readouterr().err
        assert change in error and "args.yaml has all settings" in error
        assert not path.exists()

    def test_what_decides_no_result_may_differ(self, folder, capsys):
        assert on(folder, "--eval_only", "--workers", 1, "--accumulate", 2, "--log_interval", 3) == 0
        assert "equal the recorded ones" in capsys.readouterr().out

    def test_a_folder_that_is_not_there(self, config, tmp_path, capsys):
        assert on(tmp_path / "gone", "--config", config, "--eval_only") == 2
        assert f"there is no folder {tmp_path / 'gone'}" in capsys.readouterr().err


class TestExport:
    def evaluated(self, folder, files):
        """The student's logits as evaluation computes them."""
        facts = json.loads((folder / "classes.json").read_text())
        images = torch.cat([actions._load_image(file, facts) for file in files])
        with trained(folder) as parts:
            return images, parts.learner.eval_step().logits(images, 4)["student"]

    @pytest.mark.parametrize("pool", POOLS)
    def test_safetensors_is_enough(self, pool, folders, images, tmp_path, monkeypatch):
        path = tmp_path / "new/student.safetensors"
        before = runs.snapshot(folders / pool)
        assert on(folders / pool, "--export", path) == 0
        assert runs.snapshot(folders / pool) == before
        pixels, expected = self.evaluated(folders / pool, images)
        with torch.no_grad():
            torch.testing.assert_close(load_exported(path)(pixels), expected, atol=1e-5, rtol=0)
        description = json.loads(path.with_suffix(".json").read_text())
        assert description["class_names"] == [f"class {label}" for label in range(4)]
        assert sorted(file.name for file in path.parent.iterdir()) == ["student.json", "student.safetensors"]

    @pytest.mark.parametrize("pool", ["CODAPrompt", "L2P"])  # takes a few seconds each
    def test_program_runs_by_itself(self, pool, folders, images, tmp_path):
        path = tmp_path / "student.pt2"
        assert on(folders / pool, "--export", path) == 0
        assert len(json.loads(path.with_suffix(".json").read_text())["class_names"]) == 4
        program = torch.export.load(path).module()
        pixels, expected = self.evaluated(folders / pool, images)
        for part in (slice(0, 12), slice(3, 4)):
            torch.testing.assert_close(program(pixels[part]), expected[part], atol=1e-5, rtol=0)

    @pytest.mark.parametrize("content", [b"", b"nonsense", "other"])
    def test_no_export(self, content, tmp_path):
        from safetensors.torch import save

        path = tmp_path / "x.safetensors"
        path.write_bytes(save({"a": torch.zeros(2)}) if content == "other" else content)
        with pytest.raises(ValueError, match="is not an exported student"):
            load_exported(path)

    @pytest.mark.parametrize("name", ["classes.pt2", "manifest.safetensors", "Results/metrics.pt2"])
    def test_a_file_of_the_run_is_not_replaced(self, name, folders, tmp_path, capsys):
        folder = shutil.copytree(folders / "CODAPrompt", tmp_path / "run")
        before = runs.snapshot(folder)
        assert on(folder, "--export", folder / name) == 2
        assert ".json would be replaced" in capsys.readouterr().err
        assert runs.snapshot(folder) == before

    def test_an_earlier_export_is_replaced(self, folder, tmp_path):
        assert [on(folder, "--export", tmp_path / "student.safetensors") for _ in range(2)] == [0, 0]

    def test_full_disk(self, folder, tmp_path, monkeypatch, capsys):
        def full(*_):
            raise RunFolderError("cannot write x: No space left on device")

        monkeypatch.setattr("learners.export.write_atomic", full)
        assert on(folder, "--export", tmp_path / "x.safetensors") == 2
        assert "No space left" in capsys.readouterr().err


class TestPredict:
    def test_names_and_probabilities(self, folder, images, capsys):
        assert on(folder, "--predict", *images[:2], "--top", 3) == 0
        lines = capsys.readouterr().out.splitlines()
        start = lines.index(str(images[0]))
        assert lines[start + 4] == str(images[1])
        percents = [float(line.split()[0]) for line in lines[start + 1 : start + 4]]
        assert percents == sorted(percents, reverse=True) and 0 < sum(percents) <= 100.01
        assert all(line.split("%")[1].strip().startswith("class ") for line in lines[start + 1 : start + 4])

    def test_image_of_another_size_and_mode(self, folder, tmp_path, capsys):
        Image.fromarray(np.zeros((70, 131), np.uint8)).save(tmp_path / "grey.png")
        assert on(folder, "--predict", tmp_path / "grey.png") == 0
        assert capsys.readouterr().out.count("%") == 4  # there are only 4 classes

    def test_a_folder_is_no_image(self, folder, tmp_path, capsys):
        assert on(folder, "--predict", tmp_path) == 2
        assert f"--predict: {tmp_path} is a folder, not a file" in capsys.readouterr().err

    def test_no_image(self, folder, tmp_path, capsys):
        (tmp_path / "x.png").write_text("no image")
        assert on(folder, "--predict", tmp_path / "x.png") == 2
        assert "--predict" in capsys.readouterr().err
