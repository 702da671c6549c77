import logging
import os
import subprocess
import sys

import pytest

import utils.logging as cdl_logging
from tests.processes import ROOT
from utils.logging import Progress, environment, peak_memory_mb, setup_logging

log = logging.getLogger("run")


@pytest.fixture
def output(tmp_path):
    """Set up as a run does; returns what reads the lines of output.log, without their times."""
    setup_logging(tmp_path / "output.log")
    yield lambda: [line[21:] for line in (tmp_path / "output.log").read_text(encoding="utf-8").splitlines()]
    setup_logging(None)


def test_console_and_file(output, tmp_path, capsys):
    log.info("hello")
    log.debug("only for the file")
    setup_logging(tmp_path / "output.log")  # appends, and does not write lines twice
    log.warning("mind this")
    logging.getLogger("learners.trainer").info("from a module")
    logging.getLogger("some.other.package").info("noise")
    assert capsys.readouterr().out == "hello\nWARNING: mind this\nfrom a module\n"
    assert output() == ["hello", "only for the file", "WARNING: mind this", "from a module"]


def test_other_processes_of_a_distributed_run_only_warn(tmp_path, capsys):
    setup_logging(tmp_path / "other.log", main=False)
    log.info("hello")
    log.warning("trouble")
    assert capsys.readouterr().out == "WARNING: trouble\n" and not (tmp_path / "other.log").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="needs /dev/full")
def test_a_closed_pipe_and_a_full_disk_end_no_run():
    script = "import logging; from utils.logging import setup_logging; setup_logging('/dev/full')\n"
    script += "for _ in range(9): logging.getLogger('run').info('x' * 100_000)\n"
    command = f'{sys.executable} -c "$0" | head -c 10; exit ${{PIPESTATUS[0]}}'
    result = subprocess.run(["bash", "-c", command, script], capture_output=True, text=True, cwd=ROOT)
    assert (result.returncode, result.stdout, result.stderr) == (0, "x" * 10, "")


@pytest.mark.parametrize(("redirection", "shown"), [("", "\\u2192 emoji \n"), (">&-", ""), (">&- 2>&-", "")])
def test_a_console_that_cannot_show_everything(redirection, shown):
    script = "import logging; from utils.logging import setup_logging; setup_logging(None)\n"
    script += "logging.getLogger('run').info('\u2192 emoji ')"
    command = ["bash", "-c", f'{sys.executable} -c "$0" {redirection}', script]
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert (result.returncode, result.stdout, result.stderr) == (0, shown, "")


def test_git_commit(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "file").write_text("1")
    git = "git -c user.name=a -c user.email=a@b"
    commands = f"{git} init -q; {git} add file; {git} commit -qm one; {git} tag v1; {git} rev-parse HEAD"
    commit = subprocess.check_output(["bash", "-c", commands], cwd=tmp_path, text=True).strip()
    assert cdl_logging._git_commit(tmp_path) == commit and len(commit) == 40
    (tmp_path / "file").write_text("2")
    assert cdl_logging._git_commit(tmp_path) == f"{commit}-dirty"
    assert cdl_logging._git_commit(tmp_path / "inner") is None  # somebody else's checkout


def test_environment_and_memory():
    found = environment()
    assert found["versions"]["torch"] and found["hardware"]["cores"] >= 1 and found["hardware"]["memory_gb"] > 0
    assert 10 < peak_memory_mb()["cpu"] < 1e6


def run(enabled, tasks):
    progress = Progress(enabled, tasks, roles=("teacher", "student"))
    for task, role in ((task, role) for task in range(tasks) for role in ("teacher", "student")):
        progress.start_training(task, role, 3, 0)
        for epoch in range(3):
            progress.start_epoch(epoch, 2, 1e-3 / 3)
            progress.step(16)
            progress.step(16)
            progress.update(0.5, 75.0)
            progress.end_epoch()
        progress.end_training()
    progress.close()


@pytest.mark.parametrize("bars", [None, True])
def test_one_line_per_training_on_the_console_and_per_epoch_in_the_file(output, capsys, bars):
    run(bars, 2)
    out = capsys.readouterr()
    lines = out.out.splitlines()
    assert len(lines) == 4 and lines[-1].endswith("0:00:00 left")
    assert lines[0].startswith("Task 1/2 teacher: loss 0.5000, train accuracy 75.00 %, ")
    assert len(output()) == 4 + 2 * 2 * 3
    assert any(line.startswith("Task 2/2 student epoch 3/3, lr 0.00033333333: loss 0.5000") for line in output())
    words = ("tasks", "phases", "epochs", "batches", "loss 0.5000", "images/s", "left")
    assert all(word in out.err for word in words) if bars else out.err == ""


def test_a_long_training_says_where_it_is(output, monkeypatch, capsys):
    monkeypatch.setattr(cdl_logging, "QUIET_SECONDS", 0.0)
    run(False, 1)
    out = capsys.readouterr().out
    assert "Task 1/1 teacher epoch 1/3 batch 2/2: loss 0.5000" in out
    assert len(out.splitlines()) == 2 * (1 + 3 + 3)


def test_time_left_counts_from_where_a_resumed_run_started(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(cdl_logging.time, "monotonic", lambda: now[0])
    progress = Progress(False, 4, roles=("student",))
    progress.start_training(2, "student", 10, 5)  # 2.5 of 4 tasks were done before
    assert progress._left() == "time left unknown"
    progress.start_epoch(5, 1, 0.1)
    progress.step(1)
    now[0] = 10.0
    progress.end_epoch()  # 0.1 task in 10 s: the other 1.4 take 140 s
    assert progress._left() == "0:02:20 left"
