"""Real processes: killed at random moments, stopped by signals, and two at once."""

import os
import random
import signal
import time
from pathlib import Path

from tests import runs
from utils.checkpoint import LOCK, RunFolder

L2P = ("--learner_name", "L2P", "--KD_method", "none", "--schedule", 2)


def whole_run(argv: list[str], folder: Path) -> float:
    """Run to the end; returns the seconds that it took."""
    started = time.monotonic()
    process = runs.start(argv, folder.with_suffix(".out"))
    process.join(300)
    assert process.exitcode == 0, folder.with_suffix(".out").read_text()
    return time.monotonic() - started


def test_killed_at_random_moments(config, tmp_path):
    """With worker processes, where the whole run has none."""
    whole, folder = tmp_path / "whole", tmp_path / "run"
    duration = whole_run(runs.arguments(config, whole, "--KD_method", "KD_Token", "--schedule", 1), whole)
    argv = runs.arguments(config, folder, "--KD_method", "KD_Token", "--schedule", 1, "--workers", 2)
    moments = [random.SystemRandom().uniform(0.1, 0.7) * duration for _ in range(2)]
    for moment in moments:
        process = runs.start(argv, folder.with_suffix(".out"))
        process.join(moment)
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL), folder.with_suffix(".out").read_text()
    whole_run(argv, folder)
    assert runs.results(folder) == runs.results(whole), moments
    assert not list(folder.rglob(".*"))


def wait_for(text: str, file: Path, process, count: int = 1) -> list[int]:
    """Wait until a file holds a text so many times; returns the process's workers."""
    limit = time.monotonic() + 60
    while not file.exists() or file.read_text().count(text) < count:
        assert process.is_alive() and time.monotonic() < limit, f"no {text!r} in {file}"
        time.sleep(0.01)
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def wait_for_end(process, workers: list[int]) -> int:
    """The exit code of a process, whose workers end with it."""
    process.join(60)
    limit = time.monotonic() + 20
    while alive := [pid for pid in workers if Path(f"/proc/{pid}/exe").exists()]:
        assert time.monotonic() < limit, f"processes {alive} are left"
        time.sleep(0.05)
    return process.exitcode


def test_signals_with_workers(config, tmp_path):
    """A batch system's SIGTERM reaches everyone; a second signal ends at once; no worker outlives its process."""
    argv = runs.arguments(config, tmp_path / "run", "--schedule", 200, "--workers", 2, "--max_task", 1)
    log = tmp_path / "run/output.log"
    process = runs.start(argv, tmp_path / "out")
    workers = wait_for("epoch 2/200", log, process)
    assert len(workers) >= 2
    for pid in [*workers, process.pid]:
        os.kill(pid, signal.SIGTERM)
    assert wait_for_end(process, workers) == 143 and "stopped by SIGTERM" in log.read_text()
    assert not (tmp_path / "run" / LOCK).exists()

    process = runs.start(argv, tmp_path / "out")
    wait_for("Resuming at task 1, teacher, epoch", log, process)
    workers = wait_for("teacher epoch", log, process, log.read_text().count("teacher epoch") + 1)
    for _ in range(2):
        os.kill(process.pid, signal.SIGINT)
    assert wait_for_end(process, workers) == 130
    assert RunFolder(tmp_path / "run").load_state() is not None


def test_two_at_the_same_moment(config, tmp_path):
    argv = runs.arguments(config, tmp_path / "run", *L2P)
    processes = [runs.start(argv, tmp_path / f"out{number}") for number in range(2)]
    for process in processes:
        process.join(120)
    ends = {}
    for number, process in enumerate(processes):
        ends[process.exitcode] = ends.get(process.exitcode, "") + (tmp_path / f"out{number}").read_text()
    # Where the first was done before the second began to look, there is nothing to refuse.
    assert sorted(ends) == [0, 2] or "finished run" in ends[0], ends
    assert "is in use by" in ends.get(2, "is in use by") and "Traceback" not in str(ends)
    whole_run(runs.arguments(config, tmp_path / "whole", *L2P), tmp_path / "whole")
    assert runs.results(tmp_path / "run") == runs.results(tmp_path / "whole")
