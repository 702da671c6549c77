"""Finds runs in folders and reads them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from utils.config import OPTIONS
from utils.metrics import FORMAT, AccuracyMatrix

TOKEN_METHOD = "KD_Token"  # the KD method to which --kd_prompt_param applies
_SHOWN = {"dataset", "t_model", "s_model", "learner_name", "KD_method", "kd_prompt_param", "random_s"}
# What tells data sets of one name apart, and how a row says it.
_DATA = {"split": "split", "classes": "classes", "class_names_sha256": "class names",
         "train_images": "training images", "test_images": "test images"}  # fmt: skip
NO_RUN = "holds no run"
_MOST_TASKS = 10_000

Unused = tuple[str, str]  # folder, why it is not used


class Column(NamedTuple):
    """A KD method; ``param`` is the --kd_prompt_param of the one that has it, else empty."""

    method: str
    param: tuple[int, ...] = ()

    @property
    def label(self) -> str:
        return " ".join([self.method, *map(str, self.param)])


class Row(NamedTuple):
    """What a line of the table has in common; ``settings`` is the JSON of all else that decides results."""

    dataset: str
    teacher: str
    student: str
    learner: str
    settings: str

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.dataset, self.teacher, self.student, self.learner


@dataclass(frozen=True)
class Run:
    """One run as read from its metrics.json; ``teacher`` is None for a student that learned alone."""

    folder: str
    row: Row
    column: Column
    seed: int
    num_tasks: int
    student: dict[str, Any]
    teacher: dict[str, Any] | None
    seconds: float | None
    student_only: bool  # the teachers are another run's, and so is their time
    like_the_paper: bool  # 10 tasks in the natural order, measured on the test set of the authors' split

    @property
    def tasks_done(self) -> int:
        return len(self.student["average_accuracy"])

    @property
    def complete(self) -> bool:
        return self.tasks_done == self.num_tasks


def find_runs(folders: Sequence[Path], leave_out: Path | None = None) -> tuple[list[Run], list[Unused]]:
    """All runs below ``folders``, and what lies there but cannot be used.

    Args:
        folders: existing folders.
        leave_out: a folder of no interest, such as that of the report.
    """
    runs: list[Run] = []
    unused: list[Unused] = []
    for folder in folders:
        found = _run_folders(folder, unused)
        for run_dir in found:
            try:
                runs.append(read_run(run_dir))
            except ValueError as error:
                unused.append((str(run_dir), str(error)))
        unused += _foreign(folder, found, leave_out)
    kept, doubles = _without_doubles(runs)
    return kept, sorted({*unused, *doubles})


def _run_folders(folder: Path, unused: list[Unused]) -> list[Path]:
    """The log_dirs in and below ``folder``, ordered by name; unreadable folders go to ``unused``."""

    def unreadable(error: OSError) -> None:
        unused.append((str(error.filename), f"cannot be read: {error.strerror}"))

    with_results, started = [], []
    for parent, names, files in os.walk(folder, onerror=unreadable):
        names.sort()
        if (Path(parent) / "Results" / "metrics.json").is_file():
            with_results.append(Path(parent))
        elif "args.yaml" in files:
            started.append(Path(parent))
    # The folder of --repeat has no results of its own: its runs lie in its subfolders.
    started = [path for path in started if not any(path in other.parents for other in with_results)]
    return sorted(with_results + started)


def _foreign(folder: Path, found: Sequence[Path], leave_out: Path | None) -> list[Unused]:
    """``folder`` if it holds no run, else its subfolders that hold none (and are not part of a run)."""
    if not found:
        return [(str(folder), f"{NO_RUN}: no Results/metrics.json in or below it")]
    if folder in found:
        return []
    unused = []
    for child in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
        holds = any(path == child or child in path.parents for path in found)
        if not holds and (leave_out is None or child.resolve() != leave_out.resolve()):
            unused.append((str(child), f"{NO_RUN}: no Results/metrics.json in or below it"))
    return unused


def read_run(folder: Path) -> Run:
    """Read the run of a log_dir.

    Raises:
        ValueError: it has not finished a task, is damaged or something else; the message says which.
    """
    path = folder / "Results" / "metrics.json"
    if not path.is_file():
        raise ValueError("has no Results/metrics.json: no task was finished yet")
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"Results/metrics.json cannot be read: {_first_line(error)}") from error
    if not isinstance(metrics, dict) or metrics.get("format") != FORMAT:
        raise ValueError(f"Results/metrics.json is not of format {FORMAT} of this project")
    try:
        return _run(folder, metrics)
    except KeyError as error:
        raise ValueError(f"Results/metrics.json is damaged: it lacks {error}") from error
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"Results/metrics.json is damaged: {_first_line(error)}") from error


def _run(folder: Path, metrics: Mapping[str, Any]) -> Run:
    names = [metrics[key] for key in ("dataset", "t_model", "s_model", "learner_name", "KD_method")]
    settings, seed, num_tasks = metrics["settings"], metrics["seed"], metrics["num_tasks"]
    if not all(isinstance(name, str) for name in names):
        raise ValueError("the names of data set, models and methods must be text")
    if not isinstance(settings, dict) or not isinstance(seed, int) or not isinstance(num_tasks, int):
        raise ValueError("settings, seed or num_tasks is of the wrong type")
    # To Python true is the integer 1, and numbers beyond all sense would fail or fill the page later.
    if isinstance(seed, bool) or isinstance(num_tasks, bool) or abs(seed) >= 2**64 or num_tasks > _MOST_TASKS:
        raise ValueError("seed or num_tasks is no number that a run can have")
    dataset, teacher_model, student_model, learner, method = names
    student = AccuracyMatrix.from_dict(metrics["student"])
    teacher = None if metrics["teacher"] is None else AccuracyMatrix.from_dict(metrics["teacher"])
    if not 1 <= len(student) <= num_tasks or (teacher is not None and len(teacher) != len(student)):
        raise ValueError(f"accuracies of {len(student)} tasks do not fit {num_tasks} tasks")
    param = tuple(map(int, settings["kd_prompt_param"])) if method == TOKEN_METHOD else ()
    plain = not settings.get("validation") and not settings.get("upper_bound_flag")
    data = metrics.get("data") or {}  # older runs do not tell
    if not isinstance(data, dict):
        raise ValueError("data is of the wrong type")
    drawn = dataset == "ImageNet_R" and data.get("split") == "seeded"  # not the authors' split
    seconds, phases = _times(folder)
    other = _other_settings(settings, data, num_tasks)
    return Run(
        folder=str(folder),
        row=Row(dataset, _model(teacher_model), _model(student_model), learner, other),
        column=Column(method, param),
        seed=seed,
        num_tasks=num_tasks,
        student=student.to_dict(),
        teacher=None if teacher is None else teacher.to_dict(),
        seconds=seconds,
        student_only=teacher is not None and bool(phases) and "teacher" not in phases,
        like_the_paper=plain and not drawn and num_tasks == 10 and settings.get("class_order", "natural") == "natural",
    )


def _model(name: str) -> str:
    """The bare name where a full one means the same weights."""
    return name.removesuffix(".augreg_in21k_ft_in1k")


def _other_settings(settings: Mapping[str, Any], data: Mapping[str, Any], num_tasks: int) -> str:
    """All that decides results, data set included, and is neither the seed nor shown by row and column, as JSON."""
    undecided = {option.key for option in OPTIONS.values() if not option.decides}
    rest = {key: value for key, value in settings.items() if key not in _SHOWN | undecided}
    rest |= {label: str(data.get(key, "unknown"))[:12] for key, label in _DATA.items()}
    return json.dumps({**rest, "tasks": num_tasks}, sort_keys=True)


def _times(folder: Path) -> tuple[float | None, set[str]]:
    """The run's time, and the phases that it counts, from timing.json, a file that a report can do without."""
    try:
        timing = json.loads((folder / "Results" / "timing.json").read_text(encoding="utf-8"))
        seconds, phases = timing["total_seconds"], {phase["phase"] for phase in timing.get("phases", [])}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None, set()
    return (float(seconds) if isinstance(seconds, int | float) and 0 <= seconds < 1e9 else None), phases


def _without_doubles(runs: Iterable[Run]) -> tuple[list[Run], list[Unused]]:
    """Each folder once, and of several runs with the same settings and seed the one that got furthest."""
    kept: dict[tuple[Row, Column, int], Run] = {}
    unused = []
    by_folder = {os.path.realpath(run.folder): run for run in runs}
    for run in sorted(by_folder.values(), key=lambda run: (-run.tasks_done, run.folder)):
        first = kept.setdefault((run.row, run.column, run.seed), run)
        if first is not run:
            unused.append((run.folder, f"has the settings and the seed of {first.folder}, which is used"))
    return sorted(kept.values(), key=lambda run: run.folder), unused


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
