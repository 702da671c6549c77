"""Signals, numbers that go wrong, machines at their limits: every run ends with a sentence and a good state."""

from __future__ import annotations

import errno
import json
import logging
import os
import resource
import shutil
import signal

import numpy as np
import pytest
import torch
from PIL import Image

import run
from learners import build, train
from learners.check import load_checked_config
from learners.learner import TaskTraining, TeacherStudentLearner
from learners.signals import Signals, StoppedError
from learners.steps import EvalStep
from tests import runs
from utils.checkpoint import METRICS, STATE, RunFolder, open_run

SHORT = ("--KD_method", "none", "--max_task", 1, "--schedule", 1)  # 3 steps


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    """A whole run; tests that change it work on a copy."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    with runs.quick():
        assert run.main(runs.arguments(config, folder)) == 0
    return folder


@pytest.fixture(scope="module")
def reference(finished):
    return runs.results(finished)


@pytest.fixture(autouse=True)
def quick():
    with runs.quick():
        yield


@pytest.fixture
def at(monkeypatch):
    """``at(owner, name, n, action)`` calls ``action`` before the n-th call (from 1) of a function, once."""

    def at(owner, name, n, action):
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
    @pytest.mark.parametrize(
        ("signum", "code", "step"), [(signal.SIGINT, 130, 8), (signal.SIGTERM, 143, 8), (signal.SIGTERM, 143, 6)]
    )
    def test_once_finishes_the_step_and_saves(self, signum, code, step, config, reference, tmp_path, at, capfd):
        """Step 6 is the teacher's last."""
        argv = runs.arguments(config, tmp_path / "run")
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        handlers = [signal.getsignal(number) for number in numbers]
        steps = at(TaskTraining, "train_step", step, send(signum))
        assert run.main(argv) == code
        assert len(steps) == step
        assert "finishing this step" in capfd.readouterr().err
        assert handlers == [signal.getsignal(number) for number in numbers]
        assert "stopped by SIG" in (tmp_path / "run/output.log").read_text()
        steps.clear()
        assert run.main(argv) == 0
        assert len(steps) == 24 - step  # no step is repeated
        assert runs.results(tmp_path / "run") == reference

    def test_in_the_middle_of_an_evaluation(self, config, reference, tmp_path, at):
        argv = runs.arguments(config, tmp_path / "run")
        batches = at(EvalStep, "forward", 2, send(signal.SIGTERM))  # the second task's first one
        assert run.main(argv) == 143
        assert len(batches) == 2
        steps = at(TaskTraining, "train_step", 0, None)
        assert run.main(argv) == 0
        assert steps == []
        assert runs.results(tmp_path / "run") == reference

    def test_before_training_ends_at_once_and_leaves_nothing(self, config, tmp_path, at):
        at(build, "load_backbones", 1, send(signal.SIGTERM))
        assert run.main(runs.arguments(config, tmp_path / "new" / "run")) == 143
        assert list(tmp_path.iterdir()) == []

    def test_usr1_saves_and_continues(self, config, reference, tmp_path, at):
        saves = at(RunFolder, "save_state", 0, None)
        at(TaskTraining, "train_step", 8, send(signal.SIGUSR1))
        assert run.main(runs.arguments(config, tmp_path / "run")) == 0
        assert len(saves) == 8 + 2 + 1  # epochs, tasks, and one more
        assert runs.results(tmp_path / "run") == reference

    def test_twice_ends_at_once(self, config, reference, tmp_path, at, monkeypatch):
        monkeypatch.setattr(os, "_exit", lambda code: fail(runs.Killed(code))())
        argv = runs.arguments(config, tmp_path / "run")
        at(TaskTraining, "train_step", 8, lambda *_: [send(signal.SIGINT)() for _ in range(2)])
        with pytest.raises(runs.Killed, match="130"):
            run.main(argv)
        assert run.main(argv) == 0
        assert runs.results(tmp_path / "run") == reference

    def test_evaluation_alone_ends_at_once(self, finished, at, monkeypatch):
        at(EvalStep, "forward", 1, send(signal.SIGINT))
        before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
        try:
            assert run.main(["--eval_only", "--log_dir", str(finished), "--gpuid", "-1"]) == 130
        finally:
            signal.signal(signal.SIGINT, before)

    def test_signals_by_themselves(self):
        with Signals() as signals, pytest.raises(StoppedError):
            send(signal.SIGTERM)()
        with Signals() as signals:
            signals.finish_steps()
            send(signal.SIGTERM)()
            send(signal.SIGUSR1)()
            assert (signals.stop, signals.save) == (signal.SIGTERM, True)


class TestNumbers:
    def test_divergence_names_the_place(self, config, tmp_path, capsys):
        assert run.main(runs.arguments(config, tmp_path / "run", *SHORT, "--lr", "1e30")) == 1
        log = capsys.readouterr().out
        assert "task 1, student, epoch 1, step " in log and "lower --lr" in log and "Traceback" not in log

    @pytest.mark.parametrize(("step", "where"), [(8, "epoch 1, step 3: "), (12, "epoch 2, after the last step: ")])
    def test_last_good_state_stays(self, step, where, config, reference, tmp_path, monkeypatch, capsys):
        """A parameter is poisoned after a step: within an epoch the next loss tells, at its end the save does."""
        real, calls = TaskTraining.train_step, []

        def poisoned(training, *args):
            result = real(training, *args)
            calls.append(step)
            if len(calls) == step:
                with torch.no_grad():
                    training.parameters[0].view(-1)[0] = float("nan")
            return result

        argv = runs.arguments(config, tmp_path / "run")
        with monkeypatch.context() as patch:
            patch.setattr(TaskTraining, "train_step", poisoned)
            assert run.main(argv) == 1
        out = capsys.readouterr().out
        assert f"task 1, student, {where}" in out and "last good state is kept" in out
        assert run.main(argv) == 0
        assert runs.results(tmp_path / "run") == reference

    def test_evaluation(self, config, reference, tmp_path, monkeypatch, capsys):
        """Logits that overflow would otherwise pass for wrong, or even right, answers."""
        real = EvalStep.logits

        def overflown(step, images, seen):
            logits = real(step, images, seen)
            logits["teacher"][0, 0] = float("inf")
            return logits

        argv = runs.arguments(config, tmp_path / "run")
        with monkeypatch.context() as patch:
            patch.setattr(EvalStep, "logits", overflown)
            assert run.main(argv) == 1
        assert "after task 1, logits of task 1's test images are not finite (1 of them)" in capsys.readouterr().out
        assert run.main(argv) == 0
        assert runs.results(tmp_path / "run") == reference

    def test_pool_that_cannot_grow(self, config, tmp_path, at, capsys):
        def zero(learner, task):
            with torch.no_grad():
                for name, parameter in learner.student.prompt.named_parameters():
                    parameter.zero_() if name.startswith("e_") else None

        at(TeacherStudentLearner, "begin_task", 2, zero)
        argv = runs.arguments(config, tmp_path / "run", "--KD_method", "none", "--schedule", 1)
        assert run.main(argv) == 1
        assert "task 2 cannot begin: component 0 of the prompt pool has become zero" in capsys.readouterr().out
        assert run.main(argv) == 0


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
    def test_out_of_memory(self, error, config, reference, tmp_path, at, capsys):
        argv = runs.arguments(config, tmp_path / "run")
        at(TaskTraining, "train_step", 8, fail(error))
        assert run.main(argv) == 1
        out = capsys.readouterr().out
        for advice in ("--accumulate 2", "--batch_size", "--precision bf16", "last good state is kept"):
            assert advice in out
        assert "Traceback" not in out
        assert run.main(argv) == 0
        assert runs.results(tmp_path / "run") == reference

    def test_parts_divide_the_share_of_a_device(self, config, tmp_path, monkeypatch):
        asked = load_checked_config(runs.arguments(config, tmp_path, "--batch_size", 6))
        assert "--accumulate 2" in train._advice(MemoryError(), asked)
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert "--accumulate 3" in train._advice(MemoryError(), asked)

    def test_other_errors_are_not_hidden(self, config, tmp_path, at):
        at(TaskTraining, "train_step", 1, fail(RuntimeError("shapes do not match")))
        with pytest.raises(RuntimeError, match="shapes"):
            run.main(runs.arguments(config, tmp_path / "run", *SHORT))

    def test_killed_worker(self, config, tmp_path, at, capsys):
        def kill_workers(*_):
            for child in torch.multiprocessing.active_children():
                os.kill(child.pid, signal.SIGKILL)

        argv = runs.arguments(config, tmp_path / "run", *SHORT, "--workers", 1)
        at(TaskTraining, "train_step", 1, kill_workers)
        code = run.main(argv)
        if code == 0:  # all batches were there already
            pytest.skip("the worker had done its work")
        assert code == 1
        assert "fewer --workers" in capsys.readouterr().out

    @pytest.mark.parametrize("save", [1, 4, 5])
    def test_disk_error(self, save, config, reference, tmp_path, monkeypatch, at, capsys):
        """Saves are those of the 4 epochs and of the task; the writer's error stops the run all the same."""
        real, failing = os.fsync, []

        def fsync(descriptor):
            if failing:
                raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
            real(descriptor)

        argv = runs.arguments(config, tmp_path / "run")
        at(RunFolder, "save_state", save, lambda *_: failing.append(1))
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fsync)
            assert run.main(argv) == 1
        out = capsys.readouterr().out
        assert "cannot write" in out and "/run/" in out and "quota exceeded" in out and "Traceback" not in out
        assert not list((tmp_path / "run").rglob(".*.unfinished"))
        assert run.main(argv) == 0
        assert runs.results(tmp_path / "run") == reference

    def test_file_size_limit(self, config, reference, tmp_path, at, capsys):
        """Also output.log cannot grow any more: that is no reason for a traceback."""
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        argv = runs.arguments(config, tmp_path / "run")
        at(TaskTraining, "train_step", 8, lambda *_: resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard)))
        try:
            assert run.main(argv) == 1
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        captured = capsys.readouterr()
        assert "File too large" in captured.out and "Traceback" not in captured.out + captured.err
        assert run.main(argv) == 0
        assert runs.results(tmp_path / "run") == reference


class TestRefusals:
    """Exit code 2, one sentence, nothing changed."""

    @pytest.fixture
    def refused(self, capsys):
        def content(folder):  # the log of a run that has started may say more
            files = runs.snapshot(folder) if folder.exists() else {}
            return {name: data for name, data in files.items() if name != "output.log"}

        def refused(argv, folder) -> str:
            before = content(folder)
            assert run.main(argv) == 2
            assert content(folder) == before
            lines = capsys.readouterr().err.splitlines()
            assert len(lines) == 1 and lines[0].startswith("run.py: error: ")
            return lines[0]

        return refused

    @pytest.fixture
    def unfinished(self, finished, tmp_path):
        """A run of which only the end is missing."""
        folder = shutil.copytree(finished, tmp_path / "run")
        (folder / METRICS).unlink()
        return folder

    def test_other_settings(self, config, finished, refused):
        argv = runs.arguments(config, finished, "--lr", 0.02, "--KD_method", "DKD", "--schedule", 3)
        error = refused(argv, finished)
        for change in ("lr 0.01 -> 0.02", "KD_method KD -> DKD", "schedule [2] -> [3]", "--overwrite 1"):
            assert change in error
        assert "batch_size" not in error
        assert "max_task -1 -> 1" in refused(runs.arguments(config, finished, "--max_task", 1), finished)

    def test_folder_in_use(self, config, finished, tmp_path, monkeypatch):
        """By another process: a lock does not keep its own process out."""
        script = f"import sys, run; sys.exit(run.main({runs.arguments(config, finished, '--overwrite', 1)!r}))"
        with open_run(load_checked_config(runs.arguments(config, finished))):
            done = runs.python(script)
        assert done.returncode == 2
        assert f"in use by process {os.getpid()} on " in done.stderr and done.stderr.count("\n") == 1

    def test_other_backbone(self, config, unfinished, refused):
        weights = config.parent / "teacher.pth"
        saved = weights.read_bytes()
        try:
            shutil.copy(config.parent / "student.pth", weights)
            error = refused(runs.arguments(config, unfinished), unfinished)
        finally:
            weights.write_bytes(saved)
        assert "t_weights" in error or "SHA-256 of the teacher's backbone was" in error

    def test_other_data(self, config, unfinished, refused):
        image = config.parent / "images/train/class 2/new.png"
        Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(image)
        try:
            assert "train_images differ" in refused(runs.arguments(config, unfinished), unfinished)
        finally:
            image.unlink()

    def test_other_file_to_start_from(self, config, finished, tmp_path, at, capsys):
        start = shutil.copytree(finished / "models/task-1", tmp_path / "start")
        argv = runs.arguments(config, tmp_path / "run", "--init_from", start, "--schedule", 1)
        at(TaskTraining, "train_step", 2, send(signal.SIGTERM))
        assert run.main(argv) == 143
        shutil.copy(finished / "models/task-2/S_class.pth", start)
        assert run.main(argv) == 2
        assert "init_from_sha256 differ" in capsys.readouterr().err
        shutil.copy(finished / "models/task-1/S_class.pth", start)
        assert run.main(argv) == 0

    @pytest.mark.parametrize("overwrite", [0, 1])
    @pytest.mark.parametrize("name", ["args.yaml", "models/resnet.py", "Results/table.csv"])
    def test_folder_of_something_else(self, name, overwrite, config, tmp_path, refused):
        """Neither resumed nor, with --overwrite 1, moved away: a mistyped --log_dir must not cost anything."""
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
        error = refused(runs.arguments(config, tmp_path, "--overwrite", overwrite), tmp_path)
        assert f"{name.split('/')[0]}, but not both args.yaml" in error and "choose another log_dir" in error

    def test_log_that_cannot_be_written(self, config, tmp_path, refused):
        (tmp_path / "run/output.log").mkdir(parents=True)
        assert "output.log: Is a directory" in refused(runs.arguments(config, tmp_path / "run"), tmp_path / "run")

    @pytest.mark.parametrize("existed", [False, True])
    def test_batch_larger_than_a_task(self, existed, config, tmp_path, refused):
        if existed:
            (tmp_path / "new/run").mkdir(parents=True)
        argv = runs.arguments(config, tmp_path / "new/run", "--batch_size", 15)
        assert "14 training images, fewer than batch_size 15" in refused(argv, tmp_path / "new")
        assert (tmp_path / "new").exists() == existed


class TestFolder:
    def test_overwrite(self, config, finished, reference, tmp_path, capsys):
        folder = shutil.copytree(finished, tmp_path / "run")
        (folder / "slurm-1.out").write_text("mine")
        before = runs.snapshot(folder)
        assert run.main(runs.arguments(config, folder, "--overwrite", 1, *SHORT)) == 0
        assert "moved aside to" in capsys.readouterr().out
        assert runs.snapshot(tmp_path / "run.old-1") == before
        assert runs.results(folder) != reference
        assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "run.old-1"]

    def test_works_beside_other_files(self, config, tmp_path):
        (tmp_path / "run").mkdir()
        (tmp_path / "run/slurm-1.out").write_text("mine")
        assert run.main(runs.arguments(config, tmp_path / "run", *SHORT, "--overwrite", 1)) == 0
        assert (tmp_path / "run/slurm-1.out").read_text() == "mine"

    def test_finished_run_says_so(self, config, finished, tmp_path, at, capsys):
        folder = shutil.copytree(finished, tmp_path / "run")
        before = runs.snapshot(folder)
        builds = at(build, "load_backbones", 0, None)
        assert run.main(runs.arguments(config, folder)) == 0
        assert "holds a finished run" in capsys.readouterr().out
        assert builds == [] and runs.snapshot(folder) == before
        (folder / "models/task-1/T_class.pth").write_bytes(b"PK")
        assert run.main(runs.arguments(config, folder)) == 0
        assert "WARNING" in (out := capsys.readouterr().out) and "T_class.pth is damaged" in out

    def test_a_kill_before_the_last_state_still_counts_as_finished(self, config, finished, reference, tmp_path):
        """Results are complete; more tasks would resume from the state before."""
        folder = shutil.copytree(finished, tmp_path / "run")
        (folder / "state/previous.pth").replace(folder / STATE)
        assert run.main(runs.arguments(config, folder)) == 0
        (folder / METRICS).unlink()
        assert run.main(runs.arguments(config, folder)) == 0
        assert runs.results(folder) == reference

    @pytest.mark.parametrize("moment", ["finished", "within the first task"])
    def test_more_tasks(self, moment, config, reference, tmp_path, at, caplog):
        """max_task says when to stop and changes nothing else, so it may be raised."""
        argv = runs.arguments(config, tmp_path / "run", "--max_task", 1)
        if moment == "finished":
            assert run.main(argv) == 0
            assert json.loads((tmp_path / "run" / METRICS).read_text())["num_tasks"] == 1
        else:
            at(TaskTraining, "train_step", 8, send(signal.SIGTERM))
            assert run.main(argv) == 143
        steps = at(TaskTraining, "train_step", 0, None)
        with caplog.at_level(logging.INFO):
            assert run.main(runs.arguments(config, tmp_path / "run", "--max_task", -1)) == 0
        assert len(steps) == (12 if moment == "finished" else 16)
        assert runs.results(tmp_path / "run") == reference

    def test_weights_at_another_place(self, config, reference, tmp_path, capsys):
        """Their content counts, here and when nothing is left to do."""
        argv = runs.arguments(config, tmp_path / "run")
        assert run.main([*argv, "--max_task", "1"]) == 0
        moved = shutil.copy(config.parent / "teacher.pth", tmp_path / "moved.pth")
        for _ in range(2):
            assert run.main([*argv, "--t_weights", str(moved)]) == 0
        assert "holds a finished run of this command" in "".join(capsys.readouterr())
        assert f"t_weights: {moved}" in (tmp_path / "run/args.yaml").read_text()
        models = {name: digest for name, digest in reference.items() if name.startswith("models/")}
        assert models.items() <= runs.results(tmp_path / "run").items()

    def test_repeat(self, config, tmp_path, at, capsys):
        argv = runs.arguments(config, tmp_path / "run", *SHORT, "--repeat", 2, "--random_s", 3)
        at(TaskTraining, "train_step", 5, send(signal.SIGTERM))  # in the second run
        assert run.main(argv) == 143
        assert not (tmp_path / "run/repeat.json").exists()
        assert run.main(argv) == 0
        summary = json.loads((tmp_path / "run/repeat.json").read_text())
        assert summary["seeds"] == [3, 4] and summary["student"]["final_average_accuracy"]["n"] == 2
        assert "mean ± standard deviation" in capsys.readouterr().out
        assert run.main(runs.arguments(config, tmp_path / "alone", *SHORT, "--random_s", 4)) == 0
        assert runs.results(tmp_path / "alone") == runs.results(tmp_path / "run/seed-4")
