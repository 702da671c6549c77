"""What a run tells while it runs: output.log, the console, progress bars, TensorBoard, Weights & Biases.

Modules log through ``logging.getLogger(__name__)``. INFO goes to the console and to output.log, DEBUG to output.log
only (one line per epoch), so that the file is complete and the console short.
"""

import contextlib
import importlib.metadata
import logging
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

QUIET_SECONDS = 60.0  # without bars, how often the console says where the run is
_PACKAGES = ("__main__", "run", "learners", "models", "dataloaders", "utils")
_VERSIONS = ("torch", "torchvision", "timm", "numpy")
_BARS = ("tasks", "phases", "epochs", "batches")

_log = logging.getLogger(__name__)


class _Handler(logging.Handler):
    """Adds ``%(prefix)s``, the level of warnings and errors, and drops lines instead of failing on a full disk.

    A line logged with ``extra={"bare": True}`` gets neither level nor time.
    """

    def format(self, record: logging.LogRecord) -> str:
        if getattr(record, "bare", False):
            return record.getMessage()
        record.prefix = f"{record.levelname}: " if record.levelno >= logging.WARNING else ""
        return super().format(record)

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


class _ConsoleHandler(_Handler):
    """Plain lines on the standard output, written above the progress bars rather than through them."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stdout)
            sys.stdout.flush()
        except BrokenPipeError:  # the reader is gone: discard the rest, including what Python flushes on exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except Exception:
            self.handleError(record)


class _FileHandler(_Handler, logging.FileHandler):
    """output.log."""


def setup_logging(log_file: Path | None, *, main: bool = True) -> None:
    """Send the project's log to the console and to the end of ``log_file``; a second call replaces the first.

    ``main`` is False on the other processes of a distributed run, which write no file and only warnings. Raises
    OSError where the file cannot be written.
    """
    for name in ("stdout", "stderr"):  # are to take any character, whatever their encoding, even where they are closed
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        elif hasattr(stream := getattr(sys, name), "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler, _Handler)]:
        root.removeHandler(handler)
        handler.close()
    console = _ConsoleHandler(logging.INFO if main else logging.WARNING)
    console.setFormatter(logging.Formatter("%(prefix)s%(message)s"))
    root.addHandler(console)
    if log_file is not None and main:
        file = _FileHandler(log_file, encoding="utf-8", errors="backslashreplace")
        file.setFormatter(logging.Formatter("%(asctime)s  %(prefix)s%(message)s", datefmt="%Y-%m-%d %H:%M:%S"))
        root.addHandler(file)
    for name in _PACKAGES:  # other packages keep the root's level, WARNING
        logging.getLogger(name).setLevel(logging.DEBUG)


def environment() -> dict[str, Any]:
    """Versions of Python and packages, git commit ("-dirty" with changes; None outside a checkout) and hardware."""
    import torch

    hardware = {
        "cpu": _proc_field("cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
    }
    versions = {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in _VERSIONS}}
    return {"versions": versions, "git_commit": _git_commit(Path(__file__).resolve().parents[1]), "hardware": hardware}


def _git_commit(folder: Path) -> str | None:
    if not (folder / ".git").exists():  # git would name the commit of a checkout around the folder
        return None
    command = ["git", "-c", f"safe.directory={folder}", "-C", str(folder)]
    command += ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _proc_field(file: str, field: str) -> str | None:
    """The first ``field: value`` in a file of /proc; None where there is no such file, as on macOS."""
    try:
        pairs = [line.partition(":") for line in Path("/proc", file).read_text().splitlines()]
    except OSError:
        return None
    return next((value.strip() for name, _, value in pairs if name.strip() == field), None)


def peak_memory_mb() -> dict[str, float]:
    """The most memory this process has held so far, in MiB: ``{"cpu": …, "cuda:0": …}``."""
    import torch

    # Not ru_maxrss, which a process inherits from its parent on Linux; on macOS it counts bytes.
    peak = _proc_field("self/status", "VmHWM")  # as in "812 kB"
    memory = int(peak.split()[0]) / 2**10 if peak else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    used = {"cpu": memory}
    for index in range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0):
        used[f"cuda:{index}"] = torch.cuda.max_memory_allocated(index) / 2**20
    return {device: round(mebibytes, 1) for device, mebibytes in used.items() if mebibytes}


@contextlib.contextmanager
def open_trackers(
    log_dir: Path, run_id: str, settings: Mapping[str, Any], *, tensorboard: bool, wandb: bool
) -> Iterator[Callable[[str, int, Mapping[str, float]], None]]:
    """A function that sends numbers to TensorBoard and to Weights & Biases, as far as they are asked for.

    It takes an axis, ``"epoch"`` or ``"task"``, the place on it, and the numbers by name. The settings become
    hyperparameters, with the numbers of the last task as their results.
    """
    final: dict[str, float] = {}
    with contextlib.ExitStack() as stack:
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # these two are packages that few installations have

            writer = stack.enter_context(SummaryWriter(str(log_dir / "tensorboard")))
        if wandb:
            from wandb import init

            about = {"project": "continual-distillation", "dir": str(log_dir), "config": settings}
            online = stack.enter_context(init(**about, id=run_id, resume="allow"))

        def send(axis: str, place: int, numbers: Mapping[str, float]) -> None:
            for name, value in numbers.items() if tensorboard else ():
                writer.add_scalar(name, value, place)
            if wandb:
                online.log({axis: place, **numbers})
            if axis == "task":
                final.update({f"final/{name}": value for name, value in numbers.items()})

        yield send
        if tensorboard:
            plain = {name: x if isinstance(x, (bool, int, float)) else str(x) for name, x in settings.items()}
            writer.add_hparams(plain, final, run_name=".")


def duration(seconds: float) -> str:
    """``h:mm:ss``."""
    whole = int(seconds + 0.5)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


class Progress:
    """Bars over tasks, models, epochs and batches, and lines in the log.

    Each epoch ends with a line in output.log, the training of a model with one on the console. Without bars the
    console also shows once a minute where the run is.

    Args:
        enabled: whether to draw bars; None draws them when the standard error is a terminal.
        roles: the models that each task trains, in order: ("teacher", "student") or ("student",).
    """

    def __init__(self, enabled: bool | None, num_tasks: int, *, roles: Sequence[str]) -> None:
        self.num_tasks, self.roles = num_tasks, tuple(roles)
        self._run_started = self._last_line = time.monotonic()
        self._share_before: float | None = None  # of the run, done before this process
        self._bars: list[tqdm] = []
        if sys.stderr.isatty() if enabled is None else enabled:
            look = {"leave": False, "dynamic_ncols": True, "bar_format": "{desc}{bar:30} {n_fmt}/{total_fmt}{postfix}"}
            self._bars = [tqdm(desc=f"{name:<8}", position=row, **look) for row, name in enumerate(_BARS)]

    def start_training(self, task: int, role: str, epochs: int, start_epoch: int) -> None:
        """Begin training a task's teacher or student, at epoch ``start_epoch`` (tasks and epochs count from 0)."""
        self._task, self._role, self._epoch, self._epochs = task, role, start_epoch, epochs
        self._step, self._steps, self._figures = 0, 1, ""
        self._training_speed = self._epoch_speed = _Speed()
        if self._share_before is None:
            self._share_before = self._share()
        self._draw()

    def start_epoch(self, epoch: int, steps: int, lr: float) -> None:
        """Begin epoch ``epoch`` (from 0) of ``steps`` batches with learning rate ``lr``."""
        self._epoch, self._step, self._steps, self._lr, self._epoch_speed = epoch, 0, steps, lr, _Speed()
        self._draw()

    def step(self, images: int) -> None:
        """Count one batch of ``images`` images; costs next to nothing and never waits for the device."""
        self._step += 1
        self._epoch_speed.images += images
        self._training_speed.images += images
        if self._bars:
            self._bars[-1].update()

    def update(self, loss: float, accuracy: float) -> None:
        """Show the mean loss and the training accuracy (%) of the epoch so far."""
        self._figures = f"loss {loss:.4f}, train accuracy {accuracy:.2f} %"
        self._draw()
        where = f" epoch {self._epoch + 1}/{self._epochs} batch {self._step}/{self._steps}"
        self._line(logging.NOTSET, where, self._epoch_speed)

    def end_epoch(self) -> None:
        self._epoch, self._step = self._epoch + 1, 0
        self._line(logging.DEBUG, f" epoch {self._epoch}/{self._epochs}, lr {self._lr:.8g}", self._epoch_speed)
        self._draw()

    def end_training(self) -> None:
        took = duration(time.monotonic() - self._training_speed.started)
        self._line(logging.INFO, "", f"{self._training_speed}, took {took}")

    def close(self) -> None:
        """Remove the bars."""
        for bar in reversed(self._bars):
            bar.close()

    def _draw(self) -> None:
        trained = self.roles.index(self._role) + (self._epoch == self._epochs)
        done = (self._task, trained, self._epoch, self._step)
        totals = (self.num_tasks, len(self.roles), self._epochs, self._steps)
        notes = (self._left(), self._role, self._figures, str(self._epoch_speed))
        for bar, n, total, note in zip(self._bars, done, totals, notes, strict=False):
            bar.total = total
            bar.set_postfix_str(note, refresh=False)
            bar.update(n - bar.n)
            bar.refresh()

    def _line(self, level: int, where: str, speed: "str | _Speed") -> None:
        """Log where the run is: with ``level`` (NOTSET: not at all), but without bars once a minute with INFO."""
        if not self._bars and time.monotonic() - self._last_line >= QUIET_SECONDS:
            level = logging.INFO
        if level == logging.INFO:
            self._last_line = time.monotonic()
        place = f"Task {self._task + 1}/{self.num_tasks} {self._role}{where}"
        _log.log(level, "%s: %s, %s, %s", place, self._figures, speed, self._left())

    def _share(self) -> float:
        """The share of the run that is done, 0 to 1, every epoch counting the same."""
        models = self._task * len(self.roles) + self.roles.index(self._role)
        epochs = self._epoch + self._step / self._steps
        return (models + epochs / self._epochs) / (self.num_tasks * len(self.roles))

    def _left(self) -> str:
        """The time that the rest of the run takes at the pace of this process so far."""
        share = self._share()
        if share <= self._share_before:
            return "time left unknown"
        seconds = (time.monotonic() - self._run_started) * (1 - share) / (share - self._share_before)
        return f"{duration(seconds)} left"


class _Speed:
    """Images per second since this object was made."""

    def __init__(self) -> None:
        self.images, self.started = 0, time.monotonic()

    def __str__(self) -> str:
        return f"{self.images / max(time.monotonic() - self.started, 1e-9):.0f} images/s"
