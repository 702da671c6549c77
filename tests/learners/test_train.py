"""Signals, numbers that go wrong, machines at their limits: every run ends with a sentence and a good state."""

import errno
import json
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from PIL import Image

import run
from dataloaders.tasks import TaskStream
from learners import build, train
from learners.learner import TaskTraining
from learners.steps import EvalStep
from tests import runs
from utils import parallel
from utils.checkpoint import METRICS, STATE, RunFolder

SHORT = ("--KD_method", "none", "--max_task", 1, "--schedule", 1)  # 3 steps


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    """A whole run of 24 steps: 2 tasks x 2 models x 2 epochs x 3 steps."""
    return runs.finish(config, tmp_path_factory.mktemp("finished") / "run")


@pytest.fixture(scope="module")
def reference(finished):
    return runs.results(finished)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def copy(finished, folder):
    """The finished run, to be changed."""
    return shutil.copytree(finished, folder)


def test_classes_are_weighted_only_with_a_memory(config, folder, monkeypatch):
    monkeypatch.setattr(TaskStream, "class_weights", None)
    runs.finish(config, folder, *SHORT, "--DW")


@pytest.fixture
def unfinished(copy):
    """A run of which only the end is missing."""
    (copy / "state/previous.pth").replace(copy / STATE)
    (copy / METRICS).unlink()
    return copy


@pytest.fixture
def start(config, folder):
    """Start or resume the run in ``folder``; returns the exit code."""
    with runs.quick():
        yield lambda *flags: run.main(runs.arguments(config, folder, *flags))


def test_a_run_on_the_cpu_in_spite_of_gpus_warns(config, folder, tmp_path, monkeypatch):
    """Without a flag; one that asks for GPUs is refused (test_bad_config)."""
    monkeypatch.setattr(build, "cuda_devices", lambda: 2)
    monkeypatch.setattr(parallel, "cuda_problem", lambda gpus: "too old a driver")
    (tmp_path / "no_device.yaml").write_text(config.read_text().replace("gpuid: -1", ""))
    runs.finish(tmp_path / "no_device.yaml", folder, *SHORT)
    (line,) = (line for line in (folder / "output.log").read_text().splitlines() if "WARNING" in line)
    assert "on the CPU although the driver lists GPUs" in line


@pytest.fixture
def at(monkeypatch):
    """``at(owner, name, n, action)`` calls ``action`` before the n-th call (from 1) of a function, once."""

    def at(owner, name, n=0, action=None):
        real, calls, actions = getattr(owner, name), [], [action]

        def wrapped(*args, **kwargs):
            calls.append(name)
            if len(calls) == n and actions:
                actions.pop()(*args)
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, wrapped)
        return calls

    return at


def send(signum):
    return lambda *_: os.kill(os.getpid(), signum)


def fail(error):
    def action(*_):
        raise error

    return action


class TestSignals:
    """A second signal, which ends at once, is sent in tests/test_kill.py."""

    @pytest.mark.parametrize(
        ("signum", "code", "owner", "name", "n", "left"),
        [
            (signal.SIGINT, 130, TaskTraining, "train_step", 8, 16),
            (signal.SIGTERM, 143, TaskTraining, "train_step", 6, 18),  # the teacher's last
            (signal.SIGTERM, 143, EvalStep, "forward", 2, 0),  # the second task's first batch
            (signal.SIGTERM, 143, train.results, "log_summary", 1, 0),  # when everything is done
        ],
    )
    def test_once_finishes_the_step_and_saves(
        self, signum, code, owner, name, n, left, start, reference, folder, at, capfd
    ):
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        handlers = [signal.getsignal(number) for number in numbers]
        calls = at(owner, name, n, send(signum))
        assert (start(), len(calls)) == (code, n)
        assert "finishing this step" in capfd.readouterr().err
        assert handlers == [signal.getsignal(number) for number in numbers]
        assert "stopped by SIG" in (folder / "output.log").read_text()
        steps = at(TaskTraining, "train_step")
        assert (start(), len(steps)) == (0, left)  # no step is repeated
        assert runs.results(folder) == reference

    def test_before_training_ends_at_once_and_leaves_nothing(self, start, tmp_path, at):
        at(build, "load_backbones", 1, send(signal.SIGTERM))
        assert start() == 143
        assert list(tmp_path.iterdir()) == []

    def test_usr1_saves_and_continues(self, start, reference, folder, at):
        saves = at(RunFolder, "save_state")
        at(TaskTraining, "train_step", 8, send(signal.SIGUSR1))
        assert start() == 0
        assert len(saves) == 8 + 2 + 1  # epochs, tasks, and one more
        assert runs.results(folder) == reference

    def test_evaluation_alone_ends_at_once(self, finished, at):
        at(EvalStep, "forward", 1, send(signal.SIGINT))
        before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
        try:
            assert run.main(["--eval_only", "--log_dir", str(finished), "--gpuid", "-1"]) == 130
        finally:
            signal.signal(signal.SIGINT, before)


class TestNumbers:
    @pytest.mark.parametrize(("step", "where"), [(8, "epoch 1, step 3: "), (12, "epoch 2, after the last step: ")])
    def test_last_good_state_stays(self, step, where, start, reference, folder, monkeypatch, capsys):
        """A parameter is poisoned after a step: within an epoch the next loss tells, at its end the save does."""
        real, calls = TaskTraining.train_step, []

        def poisoned(training, *args):
            result = real(training, *args)
            calls.append(step)
            if len(calls) == step:
                training.parameters[0].data.view(-1)[0] = float("nan")
            return result

        with monkeypatch.context() as patch:
            patch.setattr(TaskTraining, "train_step", poisoned)
            assert start() == 1
        out = capsys.readouterr().out
        assert f"task 1, student, {where}" in out and "lower --lr" in out and "Traceback" not in out
        assert "last good state is kept" in out
        assert start() == 0
        assert runs.results(folder) == reference

    def test_evaluation(self, start, reference, folder, monkeypatch, capsys):
        """Logits that overflow would otherwise pass for wrong, or even right, answers."""
        real = EvalStep.answer

        def overflown(*inputs):
            query, logits = real(*inputs)
            logits["teacher"][0, 0] = float("inf")
            return query, logits

        with monkeypatch.context() as patch:
            patch.setattr(EvalStep, "answer", overflown)
            assert start() == 1
        assert "after task 1, logits of task 1's test images are not finite (1 of them)" in capsys.readouterr().out
        assert start() == 0
        assert runs.results(folder) == reference


class TestLimits:
    @pytest.mark.parametrize(
        "error",
        [
            MemoryError("Unable to allocate 3.00 GiB"),
            RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried"),
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        ],
        ids=["Python", "CPU", "GPU"],
    )
    def test_out_of_memory(self, error, start, at, capsys):
        at(TaskTraining, "train_step", 2, fail(error))
        assert start(*SHORT) == 1
        out = capsys.readouterr().out
        for advice in ("--accumulate", "--batch_size", "--precision bf16", "last good state is kept"):
            assert advice in out
        assert "Traceback" not in out
        assert start(*SHORT) == 0

    def test_other_errors_are_not_hidden(self, start, at):
        at(TaskTraining, "train_step", 1, fail(RuntimeError("shapes do not match")))
        with pytest.raises(RuntimeError, match="shapes"):
            start(*SHORT)

    def test_killed_worker(self, start, at, capsys):
        def kill_workers(*_):
            for child in torch.multiprocessing.active_children():
                os.kill(child.pid, signal.SIGKILL)

        at(TaskTraining, "train_step", 1, kill_workers)
        code = start(*SHORT, "--workers", 1)
        if code == 0:  # all batches were there already
            pytest.skip("the worker had done its work")
        assert code == 1
        assert "fewer --workers" in capsys.readouterr().out

    def test_damaged_image(self, config, start, reference, folder, capsys):
        image = config.parent / "images/train/class 3/0.png"  # of the second task
        whole = image.read_bytes()
        try:
            image.write_bytes(b"")
            assert start() == 2
        finally:
            image.write_bytes(whole)
        assert f"run.py: error: cannot read the image {image}: it is empty" in capsys.readouterr().err
        assert start() == 0
        assert runs.results(folder) == reference

    @pytest.mark.parametrize("save", [1, 4, 5])
    def test_disk_error(self, save, start, reference, folder, monkeypatch, at, capsys):
        """Saves are those of the 4 epochs and of the task; the writer's error stops the run all the same."""
        real, failing = os.fsync, []

        def fsync(descriptor):
            if failing:
                raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
            real(descriptor)

        at(RunFolder, "save_state", save, lambda *_: failing.append(1))
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fsync)
            assert start() == 1
        out = capsys.readouterr().out
        assert "cannot write" in out and "/run/" in out and "quota exceeded" in out and "Traceback" not in out
        assert not list(folder.rglob(".*.unfinished"))
        assert start() == 0
        assert runs.results(folder) == reference


class TestRefusals:
    """Exit code 2, one sentence, nothing changed."""

    @pytest.fixture
    def refused(self, start, folder, capsys):
        def content():  # the log of a run that has started may say more
            files = runs.snapshot(folder) if folder.exists() else {}
            return {name: data for name, data in files.items() if name != "output.log"}

        def refused(*flags) -> str:
            before = content()
            assert start(*flags) == 2
            assert content() == before
            lines = capsys.readouterr().err.splitlines()
            assert len(lines) == 1 and lines[0].startswith("run.py: error: ")
            return lines[0]

        return refused

    def test_other_settings(self, copy, refused):
        error = refused("--lr", 0.02, "--KD_method", "DKD", "--schedule", 3)
        for change in ("lr 0.01 -> 0.02", "KD_method KD -> DKD", "schedule [2] -> [3]", "--overwrite 1"):
            assert change in error
        assert "batch_size" not in error
        assert "max_task -1 -> 1" in refused("--max_task", 1)

    def test_other_backbone(self, unfinished, config, refused):
        weights = config.parent / "teacher.pth"
        saved = weights.read_bytes()
        try:
            shutil.copy(config.parent / "student.pth", weights)
            error = refused()
        finally:
            weights.write_bytes(saved)
        assert "t_weights" in error or "SHA-256 of the teacher's backbone was" in error

    @pytest.mark.parametrize(("name", "differs"), [("new.png", "train_images"), ("0.png", "images_sha256")])
    def test_other_data(self, name, differs, unfinished, config, refused, tmp_path):
        root = shutil.copytree(config.parent / "images", tmp_path / "images")
        Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(root / "train/class 2" / name)
        assert f"{differs} differ" in refused("--dataroot", root)

    def test_other_file_to_start_from(self, finished, start, refused, tmp_path, at):
        source = shutil.copytree(finished / "models/task-1", tmp_path / "start")
        flags = ("--init_from", source, "--schedule", 1)
        at(TaskTraining, "train_step", 2, send(signal.SIGTERM))
        assert start(*flags) == 143
        shutil.copy(finished / "models/task-2/S_class.pth", source)
        assert "init_from_sha256 differ" in refused(*flags)
        shutil.copy(finished / "models/task-1/S_class.pth", source)
        assert start(*flags) == 0

    @pytest.mark.parametrize("overwrite", [0, 1])
    @pytest.mark.parametrize("name", ["args.yaml", "models/resnet.py", "Results/table.csv"])
    def test_folder_of_something_else(self, name, overwrite, folder, refused):
        """Neither resumed nor, with --overwrite 1, moved away: a mistyped --log_dir must not cost anything."""
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text("mine")
        error = refused("--overwrite", overwrite)
        assert f"{name.split('/')[0]}, but not both args.yaml" in error and "choose another log_dir" in error

    @pytest.mark.parametrize("existed", [False, True])
    def test_batch_larger_than_a_task(self, existed, folder, refused):
        if existed:
            folder.mkdir()
        assert "14 training images, fewer than batch_size 15" in refused("--batch_size", 15)
        assert folder.exists() == existed


class TestFolder:
    def test_overwrite_moves_a_run_aside_even_if_damaged(self, copy, start, tmp_path, capsys):
        (copy / "slurm-1.out").write_text("mine")
        (copy / "args.yaml").write_text("{}")
        before = runs.snapshot(copy)
        assert start("--overwrite", 1, *SHORT) == 0
        assert "moved aside to" in capsys.readouterr().out
        assert runs.snapshot(tmp_path / "run.old-1") == before
        assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "run.old-1"]

    def test_finished_run_says_so(self, copy, start, at, capsys):
        before = runs.snapshot(copy)
        builds = at(build, "load_backbones")
        assert start() == 0
        assert "holds a finished run" in capsys.readouterr().out
        assert builds == [] and runs.snapshot(copy) == before
        (copy / "models/task-1/T_class.pth").write_bytes(b"PK")
        assert start() == 0
        assert "WARNING" in (out := capsys.readouterr().out) and "T_class.pth is damaged" in out

    @pytest.mark.parametrize("moment", ["finished", "within the first task"])
    def test_more_tasks(self, moment, start, reference, folder, at):
        """max_task says when to stop and changes nothing else, so it may be raised."""
        if moment == "finished":
            assert start("--max_task", 1) == 0
            assert json.loads((folder / METRICS).read_text())["num_tasks"] == 1
        else:
            at(TaskTraining, "train_step", 8, send(signal.SIGTERM))
            assert start("--max_task", 1) == 143
        steps = at(TaskTraining, "train_step")
        assert start("--max_task", -1) == 0
        assert len(steps) == (12 if moment == "finished" else 16)
        assert runs.results(folder) == reference

    def test_weights_at_another_place(self, config, folder, start, reference, tmp_path, capsys):
        """Their content counts, when a run resumes and when nothing is left to do."""
        assert start("--max_task", 1) == 0
        moved = shutil.copy(config.parent / "teacher.pth", tmp_path / "moved.pth")
        for _ in range(2):
            assert start("--t_weights", moved) == 0
        assert "holds a finished run of this command" in "".join(capsys.readouterr())
        assert f"t_weights: {moved}" in (folder / "args.yaml").read_text()
        models = {name: digest for name, digest in reference.items() if name.startswith("models/")}
        assert models.items() <= runs.results(folder).items()

    def test_repeat(self, config, start, folder, tmp_path, at, capsys):
        flags = (*SHORT, "--repeat", 2, "--random_s", 3)
        at(TaskTraining, "train_step", 5, send(signal.SIGTERM))  # in the second run
        assert start(*flags) == 143
        assert not (folder / "repeat.json").exists()
        assert start(*flags) == 0
        summary = json.loads((folder / "repeat.json").read_text())
        assert summary["seeds"] == [3, 4] and summary["student"]["final_average_accuracy"]["n"] == 2
        assert "mean ± standard deviation" in capsys.readouterr().out
        alone = runs.finish(config, tmp_path / "alone", *SHORT, "--random_s", 4)
        assert runs.results(alone) == runs.results(folder / "seed-4")
        at(TaskTraining, "train_step", 5, send(signal.SIGTERM))
        assert start(*flags, "--overwrite", 1) == 143
        assert not (folder / "repeat.json").exists()
