"""What a run tells while it runs: output.log, the console, progress bars and TensorBoard.

Modules log through ``logging.getLogger(__name__)``. INFO goes to the console and to output.log, DEBUG to
output.log only (one line per epoch), so that the file is complete and the console short.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

PROJECT = Path(__file__).resolve().parent.parent
_PACKAGES = ("__main__", "run", "learners", "models", "dataloaders", "utils")
_VERSIONS = ("torch", "torchvision", "timm", "numpy")

# Without bars a phase gives one console line when it ends; a long one also says where it is this often.
QUIET_SECONDS = 60.0

_log = logging.getLogger(__name__)


class _ConsoleHandler(logging.Handler):
    """Plain lines on the standard output, written above the progress bars rather than through them."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stdout)
            sys.stdout.flush()
        except OSError:  # the reader of a pipe has gone: the run goes on, output.log has the rest
            pass


class _FileHandler(logging.FileHandler):
    """output.log; a class of its own so that :func:`setup_logging` finds the one it made."""


class _Formatter(logging.Formatter):
    """Offers ``%(prefix)s``: the level when it is a warning or worse, else nothing."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.prefix = f"{record.levelname}: " if record.levelno >= logging.WARNING else ""
        return super().formatMessage(record)


def setup_logging(log_file: Path | None, *, main: bool = True) -> logging.Logger:
    """Send the project's log to the console and to a file; a second call replaces what the first set up.

    Args:
        log_file: output.log, appended to when it exists; None for the console alone.
        main: False on the other processes of a distributed run, which write no file and only warnings.

    Returns:
        The logger of run.py.

    Raises:
        OSError: the file cannot be written.
    """
    root = logging.getLogger()
    for handler in [h for h in root.handlers if isinstance(h, _ConsoleHandler | _FileHandler)]:
        root.removeHandler(handler)
        handler.close()
    console = _ConsoleHandler(logging.INFO if main else logging.WARNING)
    console.setFormatter(_Formatter("%(prefix)s%(message)s"))
    root.addHandler(console)
    if log_file is not None and main:
        file = _FileHandler(log_file, encoding="utf-8")
        file.setFormatter(_Formatter("%(asctime)s  %(prefix)s%(message)s", datefmt="%Y-%m-%d %H:%M:%S"))
        root.addHandler(file)
    for name in _PACKAGES:  # other packages stay at the root's WARNING
        logging.getLogger(name).setLevel(logging.DEBUG)
    return logging.getLogger("run")


def environment() -> dict[str, Any]:
    """What a result was made with.

    Returns:
        ``versions`` (package -> version, "python" among them; None where one is missing), ``git_commit``
        (None outside a checkout, with "-dirty" when tracked files differ from it) and ``hardware`` (cpu,
        cores this process may use, memory_gb, gpus).
    """
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in _VERSIONS:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {"versions": versions, "git_commit": _git_commit(PROJECT), "hardware": _hardware()}


def peak_memory_mb() -> dict[str, float]:
    """The most memory this process has held so far, in MiB: ``{"cpu": …, "cuda:0": …}``."""
    peak = {"cpu": round(_peak_resident_kib() / 1024, 1)}
    for index in range(_cuda_devices()):
        import torch

        allocated = torch.cuda.max_memory_allocated(index)
        if allocated:
            peak[f"cuda:{index}"] = round(allocated / 2**20, 1)
    return peak


def _peak_resident_kib() -> float:
    # Not ru_maxrss where it can be helped: Linux hands the parent's peak on to a child started from it.
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return float(line.split()[1])
    except OSError:
        pass
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1024 if sys.platform == "darwin" else peak


def _git_commit(folder: Path) -> str | None:
    if not (folder / ".git").exists():  # else git would name the commit of a checkout around the folder
        return None
    git = ["git", "-c", f"safe.directory={folder}", "-C", str(folder)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
        changes = subprocess.run([*git, "status", "--porcelain", "--untracked-files=no"],
                                 capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if commit.returncode:
        return None
    return commit.stdout.strip() + ("-dirty" if changes.stdout.strip() else "")


def _hardware() -> dict[str, Any]:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {"cpu": _cpu_model(), "cores": cores, "memory_gb": round(memory, 1), "gpus": gpus}


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _cuda_devices() -> int:
    torch = sys.modules.get("torch")
    return torch.cuda.device_count() if torch is not None and torch.cuda.is_initialized() else 0


def open_tensorboard(log_dir: Path) -> Any:
    """A TensorBoard writer (``add_scalar(tag, value, step)``, ``close()``) for ``log_dir``.

    Raises:
        ValueError: the package is missing; the message says how to get it.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError("--tensorboard needs the package tensorboard, which is not installed: "
                         "run `pip install tensorboard` or leave the flag out") from error
    return SummaryWriter(str(log_dir))


def duration(seconds: float) -> str:
    """``h:mm:ss``."""
    whole = int(seconds + 0.5)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


class Progress:
    """Bars over tasks, phases, epochs and batches; without a terminal, lines.

    With bars or without, each phase ends with one line on the console, each epoch with one in output.log.
    Without bars a long phase also says once a minute where it is.

    Args:
        enabled: whether to draw bars; None draws them when the standard error is a terminal.
        num_tasks: tasks of the whole run.
        phases: phases per task: 2 for teacher and student, 1 for the student alone.
    """

    _BARS = ("tasks", "phases", "epochs", "batches")

    def __init__(self, enabled: bool | None, num_tasks: int, *, phases: int = 2) -> None:
        self.num_tasks = num_tasks
        self.phases = phases
        self._started = self._last_line = self._phase_started = self._epoch_started = time.monotonic()
        self._first: float | None = None  # share of the run that was done before this process
        self._phase = ""
        self._task = self._phase_index = self._epoch = self._step = 0
        self._epochs = self._steps = 1
        self._phase_images = self._epoch_images = 0
        self._loss = self._accuracy = float("nan")
        shown = sys.stderr.isatty() if enabled is None else enabled
        self._bars = [self._new_bar(row, name) for row, name in enumerate(self._BARS)] if shown else []

    def start_phase(self, task: int, phase: str, epochs: int, start_epoch: int) -> None:
        """Phase "teacher" or "student" of task ``task`` begins, at epoch ``start_epoch`` (both from 0)."""
        self._task, self._phase, self._epochs, self._epoch, self._step = task, phase, epochs, start_epoch, 0
        self._phase_index = 0 if phase == "teacher" else self.phases - 1
        self._phase_images, self._phase_started = 0, time.monotonic()
        self._loss = self._accuracy = float("nan")
        if self._first is None:
            self._first = self._share()
        self._reset_bar("tasks", self.num_tasks, task, self._left())
        self._reset_bar("phases", self.phases, self._phase_index, phase)
        self._reset_bar("epochs", epochs, start_epoch)

    def start_epoch(self, epoch: int, steps: int) -> None:
        """Epoch ``epoch`` (from 0) of ``steps`` batches begins."""
        self._epoch, self._step, self._steps = epoch, 0, steps
        self._epoch_images, self._epoch_started = 0, time.monotonic()
        self._reset_bar("batches", steps, 0)

    def step(self, images: int) -> None:
        """One batch of ``images`` images is done; costs next to nothing and never waits for the device."""
        self._step += 1
        self._epoch_images += images
        if self._bars:
            self._bars[3].update(1)

    def update(self, loss: float, accuracy: float) -> None:
        """Show the mean loss and the training accuracy (%) of the epoch so far."""
        self._loss, self._accuracy = loss, accuracy
        if self._bars:
            notes = [self._left(), None, self._figures(), self._rate(self._epoch_images, self._epoch_started)]
            for bar, note in zip(self._bars, notes, strict=True):
                if note is not None:
                    bar.set_postfix_str(note)
        if self._line_is_due():
            where = f"epoch {self._epoch + 1}/{self._epochs} batch {self._step}/{self._steps}"
            rate = self._rate(self._epoch_images, self._epoch_started)
            self._line(f"{self._where()} {where}: {self._figures()}, {rate}, {self._left()}")

    def end_epoch(self) -> None:
        """The epoch is done."""
        self._phase_images += self._epoch_images
        self._epoch, self._step = self._epoch + 1, 0
        line = (f"{self._where()} epoch {self._epoch}/{self._epochs}: {self._figures()}, "
                f"{self._rate(self._epoch_images, self._epoch_started)}, {self._left()}")
        if self._line_is_due():
            self._line(line)
        else:
            _log.debug(line)
        if self._bars:
            self._bars[2].update(1)
            self._bars[0].set_postfix_str(self._left())

    def end_phase(self) -> None:
        """The phase is done: one line on the console with its last figures."""
        seconds = time.monotonic() - self._phase_started
        rate = self._rate(self._phase_images, self._phase_started)
        self._line(f"{self._where()}: {self._figures()}, {rate}, took {duration(seconds)}, {self._left()}")
        if self._bars:
            self._bars[1].update(1)

    def close(self) -> None:
        """Take the bars away; the object is of no use afterwards."""
        for bar in reversed(self._bars):
            bar.close()
        self._bars = []

    @staticmethod
    def _new_bar(row: int, name: str) -> tqdm:
        return tqdm(total=1, desc=f"{name:<8}", position=row, leave=False, file=sys.stderr,
                    dynamic_ncols=True, bar_format="{desc}{bar:30} {n_fmt}/{total_fmt}{postfix}")

    def _reset_bar(self, name: str, total: int, done: int, note: str = "") -> None:
        if self._bars:
            bar = self._bars[self._BARS.index(name)]
            bar.set_postfix_str(note, refresh=False)
            bar.reset(total)
            bar.update(done)
            bar.refresh()

    def _line_is_due(self) -> bool:
        return not self._bars and time.monotonic() - self._last_line >= QUIET_SECONDS

    def _line(self, text: str) -> None:
        _log.info(text)
        self._last_line = time.monotonic()

    def _where(self) -> str:
        return f"Task {self._task + 1}/{self.num_tasks} {self._phase}"

    def _figures(self) -> str:
        return f"loss {self._loss:.4f}, train accuracy {self._accuracy:.2f} %"

    @staticmethod
    def _rate(images: int, since: float) -> str:
        return f"{images / max(time.monotonic() - since, 1e-9):.0f} images/s"

    def _share(self) -> float:
        """The share of the run that is done, 0 to 1, every epoch counting the same."""
        phases_done = self._phase_index + (self._epoch + self._step / self._steps) / self._epochs
        return (self._task + phases_done / self.phases) / self.num_tasks

    def _left(self) -> str:
        """The time that the rest of the run will take if it goes on as in this process so far."""
        share = self._share()
        done = share - self._first if self._first is not None else 0.0
        if done <= 0:
            return "time left unknown"
        return f"{duration((time.monotonic() - self._started) * (1 - share) / done)} left"
