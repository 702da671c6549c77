"""Real processes: killed at random moments, stopped by signals, and two at once.

``python -m tests.test_kill KILLS FOLDER`` kills many times over, for as long as one cares to wait.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

from tests import runs
from utils.checkpoint import LOCK, RunFolder

PAIRS = {
    "CODAPrompt KD_Token": ("--schedule", 1),
    "DualPrompt FitNets": ("--schedule", 1, "--prompt_param", 4, 4, 4),
    "L2P none": ("--schedule", 2),
}


def command(config: Path, log_dir: Path, pair: str, workers: int) -> list[str]:
    pool, kd_method = pair.split()
    flags = ("--learner_name", pool, "--KD_method", kd_method, *PAIRS[pair], "--workers", workers)
    return runs.arguments(config, log_dir, *flags)


def whole_run(argv: list[str], folder: Path) -> float:
    """Run to the end; returns the seconds that it took."""
    started = time.monotonic()
    process = runs.start(argv, folder.with_suffix(".out"))
    process.join(300)
    assert process.exitcode == 0, folder.with_suffix(".out").read_text()
    return time.monotonic() - started


def run_with_kills(argv: list[str], folder: Path, moments: list[float]) -> int:
    """Start again and again, killing after so many seconds each, at last without; returns the number of kills."""
    kills = 0
    for moment in moments:
        process = runs.start(argv, folder.with_suffix(".out"))
        process.join(moment)
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.join()
        if process.exitcode == 0:
            return kills
        assert process.exitcode == -signal.SIGKILL, folder.with_suffix(".out").read_text()
    whole_run(argv, folder)
    return kills


def test_killed_at_random_moments(config, tmp_path):
    duration = whole_run(command(config, tmp_path / "whole", "CODAPrompt KD_Token", 0), tmp_path / "whole")
    moments = [random.SystemRandom().uniform(0.1, 0.7) * duration for _ in range(2)]
    run_with_kills(command(config, tmp_path / "run", "CODAPrompt KD_Token", 2), tmp_path / "run", moments)
    assert runs.results(tmp_path / "run") == runs.results(tmp_path / "whole"), moments
    assert not list((tmp_path / "run").rglob(".*"))


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
    argv = command(config, tmp_path / "run", "L2P none", 0)
    processes = [runs.start(argv, tmp_path / f"out{number}") for number in range(2)]
    for process in processes:
        process.join(120)
    ends = {}
    for number, process in enumerate(processes):
        ends[process.exitcode] = ends.get(process.exitcode, "") + (tmp_path / f"out{number}").read_text()
    # Where the first was done before the second began to look, there is nothing to refuse.
    assert sorted(ends) == [0, 2] or "finished run" in ends[0], ends
    assert "is in use by process" in ends.get(2, "is in use by process") and "Traceback" not in str(ends)
    whole_run(command(config, tmp_path / "whole", "L2P none", 0), tmp_path / "whole")
    assert runs.results(tmp_path / "run") == runs.results(tmp_path / "whole")


def campaign(kills: int, root: Path) -> None:
    """Kill runs of every pair with and without workers at random moments until ``kills`` have hit."""
    config = runs.make(root / "small")
    runs.start(["--help"], root / "help").join()  # from now on torch is loaded
    cases, hits, number = [(pair, workers) for pair in PAIRS for workers in (0, 2)], 0, 0
    wholes = {}
    while hits < kills:
        pair, workers = cases[number % len(cases)]
        if pair not in wholes:
            whole = root / f"whole-{len(wholes)}"
            wholes[pair] = whole_run(command(config, whole, pair, 0), whole), runs.results(whole)
        duration, expected = wholes[pair]
        folder = root / f"run-{number}"
        moments = [random.uniform(0.05, 1.1) * duration for _ in range(random.randint(1, 4))]
        hits += (hit := run_with_kills(command(config, folder, pair, workers), folder, moments))
        equal = runs.results(folder) == expected
        times = [round(moment, 2) for moment in moments]
        print(f"{pair}, {workers} workers: {hit} kills after {times} s, equal: {equal}", flush=True)
        assert equal
        number += 1
    print(f"{hits} kills in {number} runs, all with equal results")


if __name__ == "__main__":
    campaign(int(sys.argv[1]), Path(sys.argv[2]))
