"""Whole runs in several processes: their results, the files they write, and how they end."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import run
from learners import check
from tests import runs
from tests.processes import ROOT, Group
from utils import parallel
from utils.checkpoint import open_run
from utils.config import Config, parse_config

LONGER = ("--schedule", "10")


def train(*command_lines):
    """``run.py`` with the one command line, or with that of this process's rank."""
    with runs.quick():
        sys.exit(run.main(command_lines[int(os.environ["RANK"]) % len(command_lines)]))


def train_in_group(size, *command_lines, code=0):
    """The outputs by rank, of processes that all end with this code."""
    with Group(size, train, *command_lines) as group:
        codes, _, outputs = zip(*group.outcomes(), strict=True)
    assert list(codes) == [code] * size, outputs
    return outputs


@pytest.fixture(scope="module")
def single(config, tmp_path_factory):
    """The folder of a run that a single process has finished."""
    return runs.finish(config, tmp_path_factory.mktemp("single") / "run")


@pytest.fixture(scope="module")
def longer(config, tmp_path_factory):
    return runs.finish(config, tmp_path_factory.mktemp("longer") / "run", *LONGER)


@pytest.fixture
def copy(single, tmp_path):
    return shutil.copytree(single, tmp_path / "run")


def metrics_of(folder):
    return json.loads((folder / "Results/metrics.json").read_text())


def assert_same_results(folder, expected):
    """The same accuracies, and losses equal but for the effect of another order of sums."""
    ours, theirs = metrics_of(folder), metrics_of(expected)
    for role in ("teacher", "student"):
        assert ours[role] == theirs[role]
        for own_task, task in zip(ours["losses"][role], theirs["losses"][role], strict=True):
            for own_epoch, epoch in zip(own_task, task, strict=True):
                assert own_epoch == pytest.approx(epoch, rel=1e-2, abs=1e-3)
        for own_task, task in zip(ours["prompt_usage"][role], theirs["prompt_usage"][role], strict=True):
            for layer, values in task.items():
                assert own_task[layer] == pytest.approx(values, rel=1e-2, abs=1e-3)
    for name in ("Results/acc.csv", "Results/acc_s.csv"):
        assert (folder / name).read_bytes() == (expected / name).read_bytes()


@pytest.mark.parametrize("size", [2, 4])
def test_processes_learn_what_one_learns(size, config, single, tmp_path):
    """The six test images of a task do not divide by four."""
    outputs = train_in_group(size, runs.arguments(config, tmp_path / "run"))
    assert_same_results(tmp_path / "run", single)
    assert set(outputs[1:]) == {""}
    assert runs.snapshot(tmp_path / "run").keys() == runs.snapshot(single).keys()


def test_repeated_runs_share_one_group_and_teachers_of_other_runs(config, tmp_path):
    for method, more in (("KD", []), ("KD_Token", ["--teacher_from", str(tmp_path / "KD")])):
        flags = ("--KD_method", method, "--random_s", 1, "--repeat", 2, "--max_task", 1, *more)
        outputs = train_in_group(2, runs.arguments(config, tmp_path / method, *flags))
        assert json.loads((tmp_path / method / "repeat.json").read_text())["seeds"] == [1, 2]
        assert "2 seeds" in outputs[0] and outputs[1] == ""
    assert outputs[0].count("teacher taken from") == 2
    name = "seed-2/models/task-1/T_class.pth"
    assert (tmp_path / "KD_Token" / name).read_bytes() == (tmp_path / "KD" / name).read_bytes()


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        ((), 0, "holds a finished run"),
        (("--lr", 0.5), 2, "other settings (lr 0.01 -> 0.5)"),
        (("--batch_size", 5), 2, "--batch_size 5 does not divide by the 2 processes: use 4 or 6"),
        (("--eval_only",), 0, "accuracy matrices equal"),
    ],
)
def test_all_processes_end_alike_and_one_says_why(flags, code, words, config, copy):
    """One process does everything but training alone."""
    before = runs.snapshot(copy)
    outputs = train_in_group(2, runs.arguments(config, copy, *flags), code=code)
    assert words in outputs[0] and outputs[1] == ""
    assert runs.snapshot(copy) == before


def test_folder_in_use_is_refused_by_all_processes(config, tmp_path):
    with open_run(Config(log_dir=tmp_path)):
        outputs = train_in_group(2, runs.arguments(config, tmp_path), code=2)
    assert f"in use by process {os.getpid()}" in outputs[0] and outputs[1] == ""


def test_teachers_of_other_data_are_refused_by_all_processes(config, copy, tmp_path):
    """The first process finds that out when all have built their objects."""
    info = json.loads((copy / "classes.json").read_text()) | {"train_images": [1, 1]}
    (copy / "classes.json").write_text(json.dumps(info))
    flags = ("--KD_method", "KD_Token", "--teacher_from", copy)
    outputs = train_in_group(2, runs.arguments(config, tmp_path / "new", *flags), code=2)
    assert "trained on other data or backbones (train_images differ)" in outputs[0] and outputs[1] == ""
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--random_s", "7"], "process 1 has other settings than process 0"),
        (["--log_interval", "3"], "process 1 has other --log_interval than process 0"),
        (["--s_weights", "{root}/teacher.pth"], "process 1 has other settings and backbone_sha256 than process 0"),
        (["--t_weights", "{root}/small.yaml"], "process 1: "),
    ],
)
def test_processes_that_would_compute_something_else_are_refused(more, words, config, tmp_path):
    command = runs.arguments(config, tmp_path / "run")
    outputs = train_in_group(2, command, command + [word.format(root=config.parent) for word in more], code=2)
    assert words in outputs[0] and outputs[1] == ""
    assert not (tmp_path / "run").exists()


def problems(monkeypatch, gpus=0, **settings):
    monkeypatch.setattr(check, "cuda_devices", lambda: gpus)
    config = parse_config(["--config", str(ROOT / "configs/icon-r_prompt.yaml"), "--log_dir", "unused"]).config()
    return "\n".join(check.check(dataclasses.replace(config, **settings)))


def test_processes_without_a_device_of_their_own_are_refused(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "0" if name == "RANK" else "4")
    assert problems(monkeypatch) == problems(monkeypatch, gpus=4) == ""
    assert "4 processes on this machine need a GPU each, but there are 2 on this machine" in problems(monkeypatch, 2)
    assert "there are 2 of --gpuid: start at most 2" in problems(monkeypatch, 8, gpuid=(0, 1))
    assert problems(monkeypatch, gpus=2, gpuid=(-1,)) == problems(monkeypatch, gpus=2, device="cpu") == ""


def test_compiled_steps_need_a_process_for_each_gpu(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    found = problems(monkeypatch, gpus=2, gpuid=(0, 1), compile=True)
    assert "leave it out, or let 2 processes use the GPUs by bash experiments/torchrun.sh 2" in found
    assert problems(monkeypatch, gpus=2, gpuid=(1,), compile=True) == ""


@pytest.mark.parametrize(("first", "then"), [(2, 4), (4, 1)])
def test_stopped_run_resumes_with_another_number_of_processes(first, then, config, longer, tmp_path):
    command = runs.arguments(config, tmp_path / "run", *LONGER)
    with Group(first, train, command) as group:
        group.wait_for("After task 1/2")
        for rank in range(first):
            group.send(signal.SIGTERM, rank)
        outcomes = group.outcomes(timeout=60)
    assert [outcome.code for outcome in outcomes] == [143] * first, outcomes
    assert "the same command resumes from here" in outcomes[0].output
    assert metrics_of(tmp_path / "run")["tasks_done"] == 1
    assert "Resuming at task 2" in train_in_group(then, command)[0]
    assert_same_results(tmp_path / "run", longer)


def train_impatiently(command_line):
    parallel.TIMEOUT_S = 10
    train(command_line)


@pytest.mark.parametrize(("victim", "signum"), [(0, signal.SIGKILL), (1, signal.SIGSTOP)])
def test_a_lost_process_ends_the_run(victim, signum, config, tmp_path):
    """One that was killed, and one that hangs for longer than the timeout."""
    with Group(2, train_impatiently, runs.arguments(config, tmp_path / "run", *LONGER)) as group:
        group.wait_for("After task 1/2")
        group.send(signum, victim)
        (other,) = group.outcomes([1 - victim], timeout=60)
    assert other.code == 1
    assert f"Process {1 - victim}: another process of this run is gone or does not answer" in other.output


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds processes through Linux's /proc")
def test_torchrun_ends_with_a_killed_process_and_resumes(config, longer, tmp_path):
    """The launcher itself, which takes long to load: all of a run's life in one test."""
    script = str(ROOT / "experiments/torchrun.sh")
    command = ["bash", script, "2", *runs.arguments(config, tmp_path / "run", *LONGER)]
    environment = {**os.environ, "VIRTUAL_ENV": sys.prefix, "OMP_NUM_THREADS": "1"}
    joined = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, env=environment, **joined) as call:
        for line in call.stdout:
            if "After task 1/2" in line:
                break
        children = Path(f"/proc/{call.pid}/task/{call.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        rest = call.stdout.read()
    # torchrun passes on the code of the process that it sees fail first: the killed one, or the one that lost it
    assert call.returncode in (1, 137) and "another process of this run is gone" in rest, rest
    done = subprocess.run(command, env=environment, check=False, **joined)
    assert done.returncode == 0 and "Resuming at task 2" in done.stdout, done.stdout
    assert_same_results(tmp_path / "run", longer)


# An interpreter that aborts when it is cleaned up, as if one of gloo's threads were in the way.
ABORTS_AT_EXIT = """
import atexit, os, runpy, sys
atexit.register(os.abort)
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


@pytest.mark.parametrize(
    ("first", "word", "code", "says"),
    [
        ("", "--no_such_flag", 2, "unknown flag"),
        ("import learners.check; learners.check.print_help = lambda: 1 / 0", "--help", 1, "ZeroDivisionError"),
    ],
)
def test_process_of_a_group_ends_without_cleaning_up_the_interpreter(first, word, code, says):
    command = [sys.executable, "-c", f"{first}\n{ABORTS_AT_EXIT}", str(ROOT / "run.py"), word]
    environment = {**os.environ, "RANK": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code and says in done.stdout + done.stderr, done
