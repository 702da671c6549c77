"""Signals, numbers that go wrong, machines at their limits: every run ends with a sentence and a good state."""

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
from learners import assemble, trainer
from learners.check import load_checked_config
from learners.experiment import _advice
from learners.prompt import Phase
from learners.signals import Signals, StoppedError
from learners.steps import EvalStep
from tests import runs
from utils.checkpoint import STATES, RunFolder, RunLock

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
    """``at(owner, name, n, action)`` calls ``action`` before the n-th call (from 1) of a method, once."""

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


def error_of(capsys) -> str:
    """The one sentence on the standard error."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("run.py: error: ")
    return lines[0]


class TestSignals:
    @pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
    def test_once_finishes_the_step_and_saves(self, signum, code, config, reference, tmp_path, at, capfd):
        argv = runs.arguments(config, tmp_path / "run")
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
        steps = at(Phase, "train_step", 8, send(signum))
        assert run.main(argv) == code
        assert len(steps) == 8
        assert "finishing this step" in capfd.readouterr().err
        assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
        assert "stopped by SIG" in (tmp_path / "run/output.log").read_text()
        steps.clear()
        assert run.main(argv) == 0
        assert len(steps) == 24 - 8  # not even a step is repeated
        assert runs.results(tmp_path / "run") == reference

    def test_in_the_middle_of_an_evaluation(self, config, reference, tmp_path, at):
        argv = runs.arguments(config, tmp_path / "run")
        steps = at(Phase, "train_step", 0, None)
        batches = at(trainer, "_counts", 2, send(signal.SIGTERM))  # the second task's first one
        assert run.main(argv) == 143
        assert len(batches) == 2
        steps.clear()
        assert run.main(argv) == 0
        assert steps == []
        assert runs.results(tmp_path / "run") == reference

    def test_at_the_last_step_of_a_phase(self, config, reference, tmp_path, at):
        argv = runs.arguments(config, tmp_path / "run")
        at(Phase, "train_step", 6, send(signal.SIGTERM))
        assert run.main(argv) == 143
        assert run.main(argv) == 0
        assert runs.results(tmp_path / "run") == reference

    def test_before_training_ends_at_once_and_leaves_nothing(self, config, tmp_path, at):
        at(assemble, "load_backbones", 1, send(signal.SIGTERM))
        assert run.main(runs.arguments(config, tmp_path / "run")) == 143
        assert list(tmp_path.iterdir()) == []

    def test_usr1_saves_and_goes_on(self, config, reference, tmp_path, at):
        commits = at(RunFolder, "commit_state", 0, None)
        at(Phase, "train_step", 8, send(signal.SIGUSR1))
        assert run.main(runs.arguments(config, tmp_path / "run")) == 0
        assert len(commits) == 8 + 2 + 1  # epochs, tasks, and one more
        assert runs.results(tmp_path / "run") == reference

    def test_twice_ends_at_once(self, config, reference, tmp_path, at, monkeypatch):
        def end(code):
            raise runs.Killed(code)

        monkeypatch.setattr(os, "_exit", end)
        argv = runs.arguments(config, tmp_path / "run")

        def twice(*_):
            send(signal.SIGINT)()
            send(signal.SIGINT)()

        at(Phase, "train_step", 8, twice)
        with pytest.raises(runs.Killed, match="130"):
            run.main(argv)
        assert run.main(argv) == 0
        assert runs.results(tmp_path / "run") == reference

    def test_evaluation_alone_ends_at_once(self, finished, at):
        at(trainer, "_counts", 1, send(signal.SIGINT))
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
        assert "task 1, student, epoch 1, step 2: loss is nan: lower --lr" in log or "step 3" in log
        assert "Traceback" not in log

    @pytest.mark.parametrize("step", [8, 12])
    def test_last_good_state_stays(self, step, config, reference, tmp_path, monkeypatch, capsys):
        """A parameter is poisoned after a step: within an epoch the next loss tells, at its end the save does."""
        real, calls = Phase.train_step, []

        def poisoned(phase, *args):
            result = real(phase, *args)
            calls.append(step)
            if len(calls) == step:
                with torch.no_grad():
                    phase.parameters[0].view(-1)[0] = float("nan")
            return result

        argv = runs.arguments(config, tmp_path / "run")
        with monkeypatch.context() as patch:
            patch.setattr(Phase, "train_step", poisoned)
            assert run.main(argv) == 1
        out = capsys.readouterr().out
        where = {
            8: "task 1, student, epoch 1, step 3: ",
            12: "task 1, student, epoch 2, after the last step: models student",
        }
        assert where[step] in out and "last good state is kept" in out
        assert run.main(argv) == 0
        assert runs.results(tmp_path / "run") == reference

    def test_evaluation(self, config, reference, tmp_path, monkeypatch, capsys):
        """Logits that overflow would otherwise pass for wrong, or even right, answers."""
        real = EvalStep._logits

        def overflown(step, images, seen):
            logits = real(step, images, seen)
            logits["teacher"][0, 0] = float("inf")
            return logits

        argv = runs.arguments(config, tmp_path / "run")
        with monkeypatch.context() as patch:
            patch.setattr(EvalStep, "_logits", overflown)
            assert run.main(argv) == 1
        assert "after task 1, logits of task 1's test images are not finite (1 of them)" in capsys.readouterr().out
        assert run.main(argv) == 0
        assert runs.results(tmp_path / "run") == reference

    def test_gradient(self, config, tmp_path, monkeypatch, capsys):
        norm = torch.nn.utils.get_total_norm
        monkeypatch.setattr(torch.nn.utils, "get_total_norm", lambda grads: norm(grads) * float("inf"))
        assert run.main(runs.arguments(config, tmp_path / "run", *SHORT)) == 1
        assert "step 1: gradient is inf" in capsys.readouterr().out

    def test_pool_that_cannot_grow(self, config, tmp_path, at, capsys):
        def zero(learner, task):
            with torch.no_grad():
                for name, parameter in learner.student.prompt.named_parameters():
                    parameter.zero_() if name.startswith("e_") else None

        at(assemble.PromptLearner, "begin_task", 2, zero)
        argv = runs.arguments(config, tmp_path / "run", "--KD_method", "none", "--schedule", 1)
        assert run.main(argv) == 1
        assert "task 2 cannot begin: component 0 of the prompt pool has become zero" in capsys.readouterr().out
        assert run.main(argv) == 0


class TestLimits:
    @pytest.mark.parametrize("error", [
        MemoryError("Unable to allocate 3.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    ], ids=["Python", "CPU", "GPU"])  # fmt: skip
    def test_out_of_memory(self, error, config, reference, tmp_path, at, capsys):
        def fail(*_):
            raise error

        argv = runs.arguments(config, tmp_path / "run")
        at(Phase, "train_step", 8, fail)
        assert run.main(argv) == 1
        out = capsys.readouterr().out
        for advice in ("--accumulate 2", "--batch_size", "--precision bf16", "last good state is kept"):
            assert advice in out
        assert "Traceback" not in out
        assert run.main(argv) == 0
        assert runs.results(tmp_path / "run") == reference

    def test_parts_divide_what_a_device_gets(self, config, tmp_path, monkeypatch):
        asked = load_checked_config(runs.arguments(config, tmp_path, "--batch_size", 6))
        assert "--accumulate 2" in _advice(MemoryError(), asked)
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert "--accumulate 3" in _advice(MemoryError(), asked)

    def test_out_of_memory_before_training(self, config, tmp_path, at, capsys):
        def fail(*_):
            raise MemoryError("Unable to allocate 3.00 GiB")

        at(assemble, "load_backbones", 1, fail)
        assert run.main(runs.arguments(config, tmp_path / "run")) == 1
        assert "--batch_size" in capsys.readouterr().out

    def test_other_errors_are_not_hidden(self, config, tmp_path, at):
        def fail(*_):
            raise RuntimeError("shapes do not match")

        at(Phase, "train_step", 1, fail)
        with pytest.raises(RuntimeError, match="shapes"):
            run.main(runs.arguments(config, tmp_path / "run", *SHORT))

    def test_killed_worker(self, config, tmp_path, at, capsys):
        def kill_workers(*_):
            for child in torch.multiprocessing.active_children():
                os.kill(child.pid, signal.SIGKILL)

        argv = runs.arguments(config, tmp_path / "run", *SHORT, "--workers", 1)
        at(Phase, "train_step", 1, kill_workers)
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
        at(RunFolder, "commit_state", save, lambda *_: failing.append(1))
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
        at(Phase, "train_step", 8, lambda *_: resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard)))
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

    def refused(self, argv, folder, capsys) -> str:
        before = runs.snapshot(folder) if folder.exists() else None
        assert run.main(argv) == 2
        assert (runs.snapshot(folder) if folder.exists() else None) == before
        return error_of(capsys)

    def test_other_settings(self, config, finished, capsys):
        argv = runs.arguments(config, finished, "--lr", 0.02, "--KD_method", "DKD", "--schedule", 3)
        error = self.refused(argv, finished, capsys)
        for change in ("lr 0.01 -> 0.02", "KD_method KD -> DKD", "schedule [2] -> [3]", "--overwrite 1"):
            assert change in error
        assert "batch_size" not in error

    def test_fewer_tasks(self, config, finished, capsys):
        error = self.refused(runs.arguments(config, finished, "--max_task", 1), finished, capsys)
        assert "max_task -1 -> 1" in error

    def test_folder_in_use(self, config, finished, capsys):
        with RunLock(finished):
            error = self.refused(runs.arguments(config, finished, "--overwrite", 1), finished, capsys)
        assert f"in use by process {os.getpid()} on " in error

    def test_other_backbone(self, config, finished, tmp_path, capsys):
        folder, weights = shutil.copytree(finished, tmp_path / "run"), config.parent / "teacher.pth"
        saved = weights.read_bytes()
        try:
            shutil.copy(config.parent / "student.pth", weights)
            (folder / "manifest.json").write_text((folder / "manifest.json").read_text())
            assert run.main(runs.arguments(config, folder)) == 0  # finished: nothing is computed with them
            unfinish(folder)
            assert run.main(runs.arguments(config, folder)) == 2
        finally:
            weights.write_bytes(saved)
        assert "SHA-256 of the teacher's backbone was" in error_of(capsys)

    def test_other_data(self, config, finished, tmp_path, capsys):
        folder, image = shutil.copytree(finished, tmp_path / "run"), config.parent / "images/train/class 2/new.png"
        unfinish(folder)
        Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(image)
        try:
            assert run.main(runs.arguments(config, folder)) == 2
        finally:
            image.unlink()
        assert "train_images differ" in error_of(capsys)

    def test_other_file_to_start_from(self, config, finished, tmp_path, at, capsys):
        start = shutil.copytree(finished / "models/task-1", tmp_path / "start")
        argv = runs.arguments(config, tmp_path / "run", "--init_from", start, "--schedule", 1)
        at(Phase, "train_step", 2, send(signal.SIGTERM))
        assert run.main(argv) == 143
        shutil.copy(finished / "models/task-2/S_class.pth", start)
        assert run.main(argv) == 2
        assert "init_from_sha256 differ" in error_of(capsys)
        shutil.copy(finished / "models/task-1/S_class.pth", start)
        assert run.main(argv) == 0

    @pytest.mark.parametrize("name", ["args.yaml", "models/resnet.py", "Results/table.csv"])
    def test_folder_of_something_else(self, name, config, tmp_path, capsys):
        """Neither resumed nor, with --overwrite 1, moved away: a mistyped --log_dir must not cost anything."""
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
        for overwrite in (0, 1):
            error = self.refused(runs.arguments(config, tmp_path, "--overwrite", overwrite), tmp_path, capsys)
            assert f"{name.split('/')[0]}, but no manifest.json" in error and "choose another log_dir" in error

    def test_log_that_cannot_be_written(self, config, tmp_path, capsys):
        (tmp_path / "run/output.log").mkdir(parents=True)
        error = self.refused(runs.arguments(config, tmp_path / "run"), tmp_path / "run", capsys)
        assert "output.log: Is a directory" in error

    @pytest.mark.parametrize("existed", [False, True])
    def test_batch_larger_than_a_task(self, existed, config, tmp_path, capsys):
        if existed:
            (tmp_path / "run").mkdir()
        error = self.refused(runs.arguments(config, tmp_path / "run", "--batch_size", 15), tmp_path / "run", capsys)
        assert "14 training images, fewer than batch_size 15" in error
        assert (tmp_path / "run").exists() == existed


def unfinish(folder):
    """As if the run had been interrupted before its last commit."""
    opened = RunFolder(folder)
    opened.open()
    opened.commit({})


class TestFolder:
    def test_works_beside_other_files(self, config, tmp_path):
        (tmp_path / "run/notes").mkdir(parents=True)
        (tmp_path / "run/notes/.args.yaml.unfinished").write_text("mine")
        (tmp_path / "run/slurm-1.out").write_text("mine")
        for _ in range(2):
            assert run.main(runs.arguments(config, tmp_path / "run", *SHORT, "--overwrite", 1)) == 0
            if not (tmp_path / "run.old-1").exists():
                assert (tmp_path / "run/slurm-1.out").read_text() == "mine"
                assert (tmp_path / "run/notes/.args.yaml.unfinished").read_text() == "mine"
        assert (tmp_path / "run.old-1/slurm-1.out").read_text() == "mine"
        assert not (tmp_path / "run/slurm-1.out").exists()

    def test_overwrite(self, config, finished, reference, tmp_path, capsys):
        folder = shutil.copytree(finished, tmp_path / "run")
        before = runs.snapshot(folder)
        assert run.main(runs.arguments(config, folder, "--overwrite", 1, *SHORT)) == 0
        assert "moved aside to" in capsys.readouterr().out
        assert runs.snapshot(tmp_path / "run.old-1") == before
        assert runs.results(folder) != reference
        assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "run.old-1"]

    def test_finished_run_says_so(self, config, finished, at, capsys):
        before = runs.snapshot(finished)
        builds = at(assemble, "load_backbones", 0, None)
        assert run.main(runs.arguments(config, finished)) == 0
        assert "holds a finished run" in capsys.readouterr().out
        assert builds == [] and runs.snapshot(finished) == before

    def test_finished_run_that_is_damaged_says_so(self, config, finished, tmp_path, capsys):
        folder = shutil.copytree(finished, tmp_path / "run")
        (folder / "Results/acc.csv").write_text("100\n")
        assert run.main(runs.arguments(config, folder)) == 0
        assert "WARNING" in (out := capsys.readouterr().out) and "acc.csv is damaged" in out

    def test_states_are_small_and_at_most_two(self, config, tmp_path, at):
        sizes = []

        def look(folder, data, needs, files):
            kept = [folder.root / name for name in STATES if (folder.root / name).exists()]
            sizes.append([len(data), len(kept)])

        for n in range(1, 11):
            at(RunFolder, "commit_state", n, look)
        assert run.main(runs.arguments(config, tmp_path / "run")) == 0
        model = (tmp_path / "run/models/task-1/T_class.pth").stat().st_size
        assert max(size for size, _ in sizes) < 4 * model and max(number for _, number in sizes) == 2
        assert [path.name for path in (tmp_path / "run/state").iterdir()] in (["a"], ["b"])

    @pytest.mark.parametrize("moment", ["finished", "within the first task"])
    def test_more_tasks(self, moment, config, reference, tmp_path, at, caplog):
        """max_task says when to stop and changes nothing else, so it may be raised."""
        argv = runs.arguments(config, tmp_path / "run", "--max_task", 1)
        if moment == "finished":
            assert run.main(argv) == 0
            assert json.loads((tmp_path / "run/Results/metrics.json").read_text())["num_tasks"] == 1
        else:
            at(Phase, "train_step", 8, send(signal.SIGTERM))
            assert run.main(argv) == 143
        steps = at(Phase, "train_step", 0, None)
        with caplog.at_level(logging.INFO):
            assert run.main(runs.arguments(config, tmp_path / "run", "--max_task", -1)) == 0
        assert len(steps) == (12 if moment == "finished" else 16)
        assert runs.results(tmp_path / "run") == reference

    def test_weights_at_another_place(self, config, reference, tmp_path, capsys):
        """It is their content that counts, here and when nothing is left to do."""
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
        at(Phase, "train_step", 5, send(signal.SIGTERM))  # in the second run
        assert run.main(argv) == 143
        assert not (tmp_path / "run/repeat.json").exists()
        assert run.main(argv) == 0
        summary = json.loads((tmp_path / "run/repeat.json").read_text())
        assert summary["seeds"] == [3, 4] and summary["student"]["final_average_accuracy"]["n"] == 2
        assert "mean ± standard deviation" in capsys.readouterr().out
        assert run.main(argv) == 0
        alone = runs.arguments(config, tmp_path / "alone", *SHORT, "--random_s", 4)
        assert run.main(alone) == 0
        assert runs.results(tmp_path / "alone") == runs.results(tmp_path / "run/seed-4")
