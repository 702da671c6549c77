"""Record the runs of one checkout and compare them with those of another, byte for byte.

    python tests/same_bytes.py record FOLDER [--checkout DIR] [--only NAME ...]
    python tests/same_bytes.py compare FOLDER OTHER

A change that should not alter results must leave accuracies, measures, losses and every model as they were. Runs use
one thread, since the number of threads decides the last digits.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

LEARNERS = ("CODAPrompt", "DualPrompt", "L2P")
METHODS = ("KD_Token", "KD", "DKD", "FitNets", "ReviewKD", "none")
CONFIG = ("--config", "configs/icon-r_prompt.yaml", "--gpuid", "-1", "--no_progress")
SHORT = (*CONFIG, "--max_task", "2", "--schedule", "2")
CODA_TOKEN = ("--learner_name", "CODAPrompt", "--KD_method", "KD_Token")

RUNS: dict[str, tuple[str, ...]] = {
    **{
        f"{learner}-{method}": (*SHORT, "--learner_name", learner, "--KD_method", method)
        for learner in LEARNERS
        for method in METHODS
    },
    "repeat": (*SHORT, *CODA_TOKEN, "--repeat", "2"),
    "teacher_from": (*SHORT, "--learner_name", "CODAPrompt", "--KD_method", "DKD", "--teacher_from", "CODAPrompt-KD"),
    "memory": (*SHORT, *CODA_TOKEN, "--memory", "40", "--DW"),
    "validation": (*SHORT, *CODA_TOKEN, "--validation"),
    "shuffled": (*SHORT, *CODA_TOKEN, "--class_order", "shuffled"),
    "accumulate": (*SHORT, *CODA_TOKEN, "--accumulate", "2"),
    "workers": (*SHORT, *CODA_TOKEN, "--workers", "2"),
    "ortho": (*SHORT, *CODA_TOKEN, "--prompt_param", "100", "8", "0.1"),
    "sgd": (*SHORT, *CODA_TOKEN, "--optimizer", "SGD", "--schedule_type", "decay", "--schedule", "1", "2"),
    "killed": (*SHORT, *CODA_TOKEN),
    "quickstart": (*CONFIG, *CODA_TOKEN, "--prompt_param", "50", "8", "0.0"),
}  # "killed" is ended by SIGKILL twice and resumed


def record(folder: Path, checkout: Path, only: list[str]) -> None:
    """Run what is not yet recorded in ``folder``."""
    for name in only or RUNS:
        flags = [str(folder / word) if word == "CODAPrompt-KD" else word for word in RUNS[name]]
        command = [sys.executable, "-u", "run.py", *flags, "--log_dir", str(folder / name)]
        print(f"{name} ...", flush=True)
        for seconds in (5, 6) if name == "killed" else ():
            process = _start(command, checkout)
            time.sleep(seconds)
            process.send_signal(signal.SIGKILL)
            process.wait()
        if _start(command, checkout).wait() != 0:
            sys.exit(f"{name} failed: {' '.join(command)}")


def _start(command: list[str], checkout: Path) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=checkout, env=environment, stdout=subprocess.DEVNULL)


def compare(folder: Path, other: Path) -> int:
    """Print every difference; the exit code is 1 if there is one."""
    differences = 0
    for name in RUNS:
        mine, theirs = (dict(_contents(root / name)) for root in (folder, other))
        unequal = sorted(key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key))
        differences += len(unequal)
        print(f"{name}: {len(mine)} equal" if mine and not unequal else f"{name}: {', '.join(unequal) or 'no files'}")
    return 1 if differences else 0


def _contents(root: Path) -> Iterator[tuple[str, bytes]]:
    """What must not change: CSV files and models as bytes, the metrics key by key."""
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if "state/" in name:
            continue
        if path.suffix in (".csv", ".pth") or path.name == "repeat.json":
            yield name, path.read_bytes()
        elif path.name == "metrics.json":
            for key, value in json.loads(path.read_text(encoding="utf-8")).items():
                yield f"{name}: {key}", json.dumps(value, sort_keys=True).encode()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("record", "compare"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("other", type=Path, nargs="?")
    parser.add_argument("--checkout", type=Path, default=Path(__file__).resolve().parent.parent)
    parser.add_argument("--only", nargs="+", choices=RUNS, default=[])
    arguments = parser.parse_args()
    if arguments.action == "compare":
        return compare(arguments.folder, arguments.other)
    record(arguments.folder.resolve(), arguments.checkout, arguments.only)
    return 0


if __name__ == "__main__":
    sys.exit(main())
