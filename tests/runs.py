"""Whole runs of ``run.py`` that take a second: two tasks of two classes, small images, small random ViTs."""

import contextlib
import hashlib
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest.mock import patch

import numpy as np
from PIL import Image

import run
from tests.processes import FORKSERVER, ROOT
from utils import plots
from utils.checkpoint import LOCK

CONFIG = """
dataset: ImageFolder
dataroot: {root}/images
first_split_size: 2
other_split_size: 2
crop_scale: [0.5, 1.0]
workers: 0
schedule: [2]
batch_size: 4
lr: 0.01
t_model: mini_vit_small
s_model: mini_vit_small
t_weights: {root}/teacher.pth
s_weights: {root}/student.pth
kd_prompt_param: [2, 4]
prompt_param: [5, 4, 1]
no_progress: true
gpuid: -1
"""
CLASS_NAMES = ("class 0", os.fsdecode(b"class 1\xe9"), "class 2", "class 3")  # the second is not UTF-8
CLASSES, TRAIN_IMAGES, TEST_IMAGES = 4, 7, 3  # of each class; with batches of 4 an epoch has 3 steps

# Times, and what only tells how a run went: all other files must be equal when results are.
NOT_RESULTS = ("Results/timing.json", "output.log")


def make(root: Path) -> Path:
    """Data, weights and configuration of small runs in ``root``; returns the configuration."""
    import torch

    from models.backbones import load_backbone

    random = np.random.default_rng(0)
    for part, number in (("train", TRAIN_IMAGES), ("val", TEST_IMAGES)):
        for label in range(CLASSES):
            folder = root / "images" / part / CLASS_NAMES[label]
            folder.mkdir(parents=True)
            for index in range(number):
                pixels = random.integers(0, 150, (16, 16, 3), dtype=np.uint8)
                pixels[:, :, label % 3] += np.uint8(60 + 20 * (label // 3))
                Image.fromarray(pixels).save(folder / f"{index}.png")
    for seed, role in enumerate(("teacher", "student")):
        torch.manual_seed(seed)
        vit = load_backbone("mini_vit_small", pretrained=False).vit.vit
        torch.save(vit.state_dict(), root / f"{role}.pth")
    config = root / "small.yaml"
    config.write_text(CONFIG.format(root=root))
    return config


def arguments(config: Path, log_dir: Path | str, *more: object) -> list[str]:
    """A command line."""
    return [str(word) for word in ("--config", config, "--log_dir", log_dir, *more)]


def finish(config: Path, log_dir: Path, *more: object) -> Path:
    """Run to the end in this process, without pictures; returns the folder."""
    with quick():
        assert run.main(arguments(config, log_dir, *more)) == 0
    return log_dir


def results(log_dir: Path) -> dict[str, str]:
    """SHA-256 of every file that must not depend on how a run went.

    Of ``args.yaml`` the folder and the number of workers are left out.
    """
    content = {}
    for path in sorted(log_dir.rglob("*")):
        name = path.relative_to(log_dir).as_posix()
        if path.is_file() and name not in NOT_RESULTS and not name.startswith("state/"):
            data = path.read_bytes()
            if name == "args.yaml":
                lines = data.splitlines(True)
                data = b"".join(line for line in lines if not line.startswith((b"log_dir:", b"workers:")))
            content[name] = hashlib.sha256(data).hexdigest()
    return content


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Everything in a folder but its lock, to see that nothing has changed; None for folders."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
        if path.name != LOCK
    }


def python(script: str) -> subprocess.CompletedProcess:
    """Run a Python program in the project's folder."""
    return subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)


class Killed(BaseException):
    """Stands for the end of a process within a test's own process."""


@contextlib.contextmanager
def quick() -> Iterator[None]:
    """Leave the pictures out, which take longer than the rest of a small run."""
    with patch.object(plots, "draw", lambda metrics: {"accuracy.png": b"picture"}):
        yield


def start(argv: Sequence[str], output: Path) -> multiprocessing.Process:
    """Start ``run.py`` as a process, a fork of one that has loaded torch; ``output`` is appended to."""
    process = FORKSERVER.Process(target=_run, args=(list(argv), str(output)))
    process.start()
    return process


def _run(argv: list[str], output: str) -> None:
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)
    multiprocessing.set_start_method("fork", force=True)  # for workers, as where run.py is started by a user
    with quick():
        code = run.main(argv)
    sys.stdout.flush()
    sys.exit(code)
