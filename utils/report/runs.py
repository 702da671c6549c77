"""Finds runs in folders and reads them."""

import gzip
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from utils.config import make_config
from utils.logging import duration
from utils.metrics import FORMAT, measure

TOKEN_METHOD = "KD_Token"  # the KD method to which --kd_prompt_param applies
_NOT_IN_SETTINGS = {"dataset", "t_model", "s_model", "learner_name", "KD_method", "kd_prompt_param", "kd_param"}
_NOT_IN_SETTINGS |= {"random_s", "max_task"}  # the latter shows in the number of tasks


class Row(NamedTuple):
    """What a row of the table is about."""

    dataset: str
    teacher: str
    student: str
    learner: str

    @property
    def models(self) -> str:
        return " → ".join(name.removesuffix("_patch16_224") for name in (self.teacher, self.student))


@dataclass(frozen=True)
class Run:
    """One run as read from its metrics.json."""

    folder: str
    row: Row
    column: str  # the KD method with the parameters that are not the default, KD_Token with its --kd_prompt_param
    settings: str  # JSON of all else that affects results, except the seed
    seed: int
    num_tasks: int
    stream_tasks: int  # of the data set; more than num_tasks where --max_task cut the run
    models: dict[str, dict[str, Any]]  # role -> accuracies and measures; a student that learned alone has no teacher
    time: str
    like_the_paper: bool  # all of 10 tasks in the natural order, measured on the test set of the authors' split

    @property
    def identity(self) -> tuple[Row, str, str, int]:
        """What two runs share that should give the same numbers."""
        return self.row, self.column, self.settings, self.seed

    @property
    def tasks_done(self) -> int:
        return len(self.models["student"]["average_accuracy"])

    @property
    def accuracy(self) -> float:
        return self.models["student"]["final_average_accuracy"]

    @property
    def complete(self) -> bool:
        return self.tasks_done == self.num_tasks

    @property
    def cut(self) -> bool:
        return self.num_tasks < self.stream_tasks

    @property
    def progress(self) -> str:
        return f"{self.tasks_done} of {self.stream_tasks} tasks"


def find_runs(folders: Sequence[Path]) -> tuple[list[Run], list[tuple[str, str]]]:
    """All runs below ``folders``, and (folder, reason) for those that are not used.

    Besides log_dirs, a metrics.json that is kept as ``*.json.gz`` is a run. Of several runs with the same settings and
    seed the one that got furthest is used. A ValueError names a folder without any run.
    """
    runs: dict[Path, Run] = {}
    unused: dict[str, str] = {}
    for folder in folders:
        found = {path.parent.parent for path in folder.rglob("Results/metrics.json")} | {*folder.rglob("*.json.gz")}
        parents = {parent for path in found for parent in path.parents}  # such as the folder of --repeat
        started = {path.parent for path in folder.rglob("args.yaml")} - found - parents
        for path in found:
            try:
                runs[path.resolve()] = read_run(path)
            except ValueError as error:
                unused[str(path)] = str(error)
        unused |= {str(path): "has no Results/metrics.json: no task was finished yet" for path in started}
        if not found | started:
            raise ValueError(f"there is no run in {folder}: give the log_dir of a run or a folder of runs")
    kept: dict[Any, Run] = {}
    for run in sorted(runs.values(), key=lambda run: (-run.tasks_done, run.folder)):
        used = kept.setdefault(run.identity, run)
        if used is not run:
            unused[run.folder] = f"has the settings and the seed of {used.folder}, which is used"
    return sorted(kept.values(), key=lambda run: run.folder), sorted(unused.items())


def read_run(folder: Path) -> Run:
    """Read the run of a log_dir, or of a ``.json.gz``; a ValueError says what is wrong with its metrics.json."""
    try:
        is_kept = folder.suffix == ".gz"
        content = gzip.decompress(folder.read_bytes()) if is_kept else (folder / "Results/metrics.json").read_bytes()
        metrics = json.loads(content.decode())
        if metrics["format"] != FORMAT:
            raise ValueError(f"format {metrics['format']} instead of {FORMAT}")
        return _run(folder, metrics)
    except (OSError, EOFError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"Results/metrics.json is damaged or foreign ({type(error).__name__}: {error})") from error


def _run(folder: Path, metrics: Mapping[str, Any]) -> Run:
    settings = make_config({}).result_settings() | metrics["settings"]  # an older run lacks newer keys
    data, num_tasks = metrics["data"], int(metrics["num_tasks"])
    stream_tasks = int(metrics.get("stream_tasks", num_tasks))
    names = [str(metrics[key]) for key in ("dataset", "t_model", "s_model", "learner_name")]
    names = [name.removesuffix(".augreg_in21k_ft_in1k") for name in names]  # means the same weights
    others = {key: value for key, value in settings.items() if key not in _NOT_IN_SETTINGS}
    others |= {key: str(value)[:12] for key, value in data.items()} | {"tasks": num_tasks}
    method = str(metrics["KD_method"])
    parameters = list(map(str, settings["kd_prompt_param"])) if method == TOKEN_METHOD else []
    parameters += [f"{name}={value}" for name, value in metrics.get("kd_param", {}).items()]
    roles = ("student",) if metrics["teacher"] is None else ("teacher", "student")
    papers_order = settings["class_order"] == "natural" and not settings["upper_bound_flag"]
    papers_test_set = not settings["validation"] and (names[0] != "ImageNet_R" or data["split"] != "seeded")
    return Run(
        folder=str(folder),
        row=Row(*names),
        settings=json.dumps(others, sort_keys=True),
        column=" ".join([method, *parameters]),
        seed=int(metrics["seed"]),
        num_tasks=num_tasks,
        stream_tasks=stream_tasks,
        models={role: measure(metrics[role]["accuracy_matrix"]) for role in roles},
        time=_time(folder, roles),
        like_the_paper=num_tasks == stream_tasks == 10 and papers_order and papers_test_set,
    )


def _time(folder: Path, roles: Collection[str]) -> str:
    """The run's time from timing.json, which a report can do without; marked if it lacks the teacher's training."""
    try:
        timing = json.loads((folder / "Results/timing.json").read_text(encoding="utf-8"))
        trained = {training["phase"] for training in timing["phases"]}
        return duration(timing["total_seconds"]) + ("" if trained >= {*roles} else " (student only)")
    except (OSError, ValueError, LookupError, TypeError):
        return ""
