"""A run that is killed at any moment ends, after the same command, with the same bytes."""

import logging
import os
import shutil
from pathlib import Path

import pytest

import run
from learners import trainer
from learners.learner import TaskTraining
from learners.steps import EvalStep
from tests import runs
from tests.runs import Killed
from utils import checkpoint
from utils.checkpoint import PREVIOUS_STATE, STATE

PAIRS = {
    "CODAPrompt KD_Token": [],
    "DualPrompt ReviewKD": ["--prompt_param", 4, 4, 4, "--optimizer", "SGD"],
    "L2P none": ["--accumulate", 2],
    "APT KD": ["--prompt_param", 0.01, "--ema_coeff", 0.7],
}


@pytest.fixture(scope="module")
def reference(config, tmp_path_factory):
    """The results without interruption."""
    return runs.results(runs.finish(config, tmp_path_factory.mktemp("reference")))


@pytest.fixture(autouse=True)
def quick():
    with runs.quick():
        yield


class Interruption:
    """Ends a run at the n-th event: a step of training, a batch of evaluation, an operation on files.

    Like a process that was killed it does nothing more: it neither cleans up nor waits for anything.
    """

    def __init__(self, monkeypatch):
        self.left = self.counted = None
        self.dead = False
        self.log = []
        for owner, name, kind in (
            (TaskTraining, "train_step", "step"),
            (EvalStep, "forward", "evaluation"),
            (checkpoint, "write_atomic", "write"),
            (os, "replace", "replace"),
            (Path, "unlink", "unlink"),
        ):
            monkeypatch.setattr(owner, name, self._mortal(getattr(owner, name), kind))
        # Within the thread that asks, so that every event has its place in one order.
        monkeypatch.setattr(trainer.ThreadPoolExecutor, "submit", _at_once)

    def _mortal(self, function, kind):
        def mortal(*args, **kwargs):
            self.log.append(kind)
            if self.left is not None and self.counted in (None, kind):
                self.left -= 1
                self.dead = self.dead or self.left < 0
            if self.dead:
                raise Killed
            return function(*args, **kwargs)

        return mortal

    def main(self, argv, *, after=None, counted=None):
        """Run and die at event number ``after`` (from 0) of one kind, or of all kinds.

        Returns the exit code, None when it has died.
        """
        self.left, self.counted, self.dead, self.log = after, counted, False, []
        try:
            return run.main(argv)
        except Killed:
            return None
        finally:
            self.left, self.dead = None, False


def _at_once(executor, function, *args):
    future = trainer.Future()
    try:
        future.set_result(function(*args))
    except Exception as error:
        future.set_exception(error)
    return future


@pytest.mark.parametrize("pair", PAIRS)
def test_killed_again_and_again(pair, config, tmp_path, monkeypatch):
    flags = ("--learner_name", pair.split()[0], "--KD_method", pair.split()[1], *PAIRS[pair])
    expected = runs.results(runs.finish(config, tmp_path / "whole", *flags))
    argv = runs.arguments(config, tmp_path / "run", *flags)
    interruption = Interruption(monkeypatch)
    deaths = 0
    while interruption.main(argv, after=20 + 7 * deaths % 10) is None:
        deaths += 1
        assert deaths < 40
    assert deaths > 1
    assert runs.results(tmp_path / "run") == expected


def test_no_epoch_is_lost(config, reference, tmp_path, monkeypatch, caplog):
    """Killed at the last of 24 steps, 2 tasks x 2 models x 2 epochs x 3 steps: only its epoch is repeated.

    The resume may differ in the folder's place, the number of workers, and how often losses are read.
    """
    interruption = Interruption(monkeypatch)
    assert interruption.main(runs.arguments(config, tmp_path / "run"), after=23, counted="step") is None
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    with caplog.at_level(logging.INFO):
        assert interruption.main(runs.arguments(config, moved, "--workers", 1, "--log_interval", 1)) == 0
    assert "Resuming at task 2, student, epoch 2, step 1" in caplog.text
    assert interruption.log.count("step") == 3
    assert runs.results(moved) == reference


def test_other_threads(died, config, reference, tmp_path, monkeypatch, caplog):
    folder = shutil.copytree(died, tmp_path / "run")
    monkeypatch.setattr(trainer.torch, "get_num_threads", lambda: 7)
    assert run.main(runs.arguments(config, folder)) == 0
    assert "7 threads instead of" in caplog.text
    assert runs.results(folder) == reference


def test_killed_at_any_moment_of_the_end_of_a_task(config, reference, tmp_path, monkeypatch):
    """In the evaluation, while models and results are written, and before the state that follows them."""
    interruption = Interruption(monkeypatch)
    start = runs.arguments(config, tmp_path / "start")
    assert interruption.main(start, after=1, counted="evaluation") is None  # that of the second task
    events = 0
    while True:
        folder = shutil.copytree(tmp_path / "start", tmp_path / f"run-{events}")
        argv = runs.arguments(config, folder)
        code = interruption.main(argv, after=events)
        assert interruption.log.count("step") == 0
        if code == 0:
            break
        assert interruption.main(argv) == 0
        assert runs.results(folder) == reference, events
        events += 1
    assert events > 10


@pytest.fixture(scope="module")
def died(config, tmp_path_factory):
    """A run that died while it trained the student on the second task."""
    folder = tmp_path_factory.mktemp("died") / "run"
    with runs.quick(), pytest.MonkeyPatch.context() as patch:
        assert Interruption(patch).main(runs.arguments(config, folder), after=22, counted="step") is None
    return folder


class TestDamage:
    @pytest.fixture
    def interrupted(self, died, tmp_path):
        return shutil.copytree(died, tmp_path / "run")

    def test_a_flipped_bit_of_the_state(self, interrupted, config, reference, capsys):
        data = bytearray((interrupted / STATE).read_bytes())
        data[len(data) // 2] ^= 4
        (interrupted / STATE).write_bytes(data)
        assert run.main(runs.arguments(config, interrupted)) == 0
        assert "newest.pth is damaged" in capsys.readouterr().out
        assert "resuming from the state before it" in (interrupted / "output.log").read_text()
        assert runs.results(interrupted) == reference

    @pytest.mark.parametrize("name", ["models/task-1/T_class.pth", "args.yaml", "classes.json", STATE])
    @pytest.mark.parametrize("lost", [False, True])
    def test_refused_and_nothing_changed(self, name, lost, interrupted, config, capsys):
        if name == STATE:
            (interrupted / PREVIOUS_STATE).write_bytes(b"damaged")
        path = interrupted / name
        path.unlink() if lost else path.write_bytes(path.read_bytes()[:-3])
        before = runs.snapshot(interrupted)
        assert run.main(runs.arguments(config, interrupted)) == 2
        error = capsys.readouterr().err
        assert error.startswith("run.py: error: ") and error.count("\n") == 1
        assert (PREVIOUS_STATE if lost and name == STATE else name) in error
        assert {**runs.snapshot(interrupted), "output.log": b""} == {**before, "output.log": b""}
