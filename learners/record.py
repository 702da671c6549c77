"""What a run has measured so far, and the result files made from it."""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dataloaders.tasks import TaskStream
from learners.opening import CLASSES
from utils.checkpoint import RunFolder
from utils.config import Config, ConfigError
from utils.logging import environment, peak_memory_mb
from utils.metrics import AccuracyMatrix, acc_csv, build_metrics, metrics_json, summary_lines, summary_table

if TYPE_CHECKING:
    from learners.assemble import Parts

TEACHER_ACCURACY, STUDENT_ACCURACY = "Results/acc.csv", "Results/acc_s.csv"
METRICS, TIMING = "Results/metrics.json", "Results/timing.json"

_log = logging.getLogger(__name__)


@dataclass
class RunRecord:
    """Measurements by role (``teacher``, ``student``) and task.

    Attributes:
        accuracy: rows of each role's accuracy matrix, %.
        losses: per task, per epoch, mean of each term.
        usage: per task, how much each pool entry is used, by layer.
        phases: duration of each phase, s, and its images per second.
        evaluation: duration of each task's evaluation, s.
    """

    accuracy: dict[str, list[list[float]]] = field(default_factory=dict)
    losses: dict[str, list[list[dict[str, float]]]] = field(default_factory=dict)
    usage: dict[str, list[dict[str, list[float]]]] = field(default_factory=dict)
    phases: list[dict[str, Any]] = field(default_factory=list)
    evaluation: list[dict[str, Any]] = field(default_factory=list)

    def add_epoch(self, role: str, task: int, epoch: int, means: Mapping[str, float]) -> None:
        """Enter an epoch's losses; one that is repeated replaces what it had entered."""
        tasks = self.losses.setdefault(role, [])
        tasks[task:] = [*tasks[task : task + 1], []][:1]
        tasks[task][epoch:] = [dict(means)]

    def add_time(self, task: int, phase: str, epochs: int, seconds: float, images: int) -> None:
        """Add to a phase's time; a resumed phase adds up."""
        for entry in self.phases:
            if (entry["task"], entry["phase"]) == (task, phase):
                break
        else:
            entry = {"task": task, "phase": phase, "epochs": 0, "seconds": 0.0, "images": 0}
            self.phases.append(entry)
        entry["epochs"] += epochs
        entry["seconds"] += seconds
        entry["images"] += images

    def state(self) -> str:
        """All of it, for a resume: as text, since a run's states hold it as one piece."""
        return json.dumps(vars(self))

    @classmethod
    def from_state(cls, state: str) -> RunRecord:
        return cls(**json.loads(state))

    def matrix(self, role: str) -> AccuracyMatrix | None:
        """The role's accuracies, or None where the run has no such model."""
        return AccuracyMatrix(self.accuracy[role]) if role in self.accuracy else None

    def files(
        self,
        *,
        settings: Mapping[str, Any],
        settings_hash: str,
        num_tasks: int,
        classes: Sequence[Sequence[int]],
        parameters: Mapping[str, Any],
        environment: Mapping[str, Any],
        peak_memory_mb: Mapping[str, float],
        data: Mapping[str, Any],
    ) -> tuple[dict[str, bytes], dict[str, Any]]:
        """Contents of ``Results/``, and the metrics as plain data for the pictures."""
        teacher, student = self.matrix("teacher"), self.matrix("student")
        metrics = build_metrics(
            settings=settings,
            settings_hash=settings_hash,
            num_tasks=num_tasks,
            classes=classes,
            teacher=teacher,
            student=student,
            parameters=parameters,
            losses=self.losses,
            prompt_usage=self.usage,
            data=data,
        )
        timing = self._timing() | {"peak_memory_mb": dict(peak_memory_mb), **environment}
        files = {
            METRICS: metrics_json(metrics).encode(),
            TIMING: (json.dumps(timing, indent=1) + "\n").encode(),
            STUDENT_ACCURACY: acc_csv(student.average_accuracy).encode(),
        }
        if teacher is not None:
            files[TEACHER_ACCURACY] = acc_csv(teacher.average_accuracy).encode()
        return files, metrics

    def _timing(self) -> dict[str, Any]:
        phases = [
            {key: value for key, value in entry.items() if key != "images"}
            | {"images_per_second": entry["images"] / entry["seconds"] if entry["seconds"] else None}
            for entry in self.phases
        ]
        total = sum(entry["seconds"] for entry in [*self.phases, *self.evaluation])
        return {"phases": phases, "evaluation": self.evaluation, "total_seconds": total}


class ResultFiles:
    """Makes the files of ``Results/`` from a record."""

    def __init__(self, config: Config, parts: Parts) -> None:
        self.config = config
        self.parts = parts
        self.environment = environment()

    def files(self, record: RunRecord) -> dict[str, bytes]:
        """Content of each file."""
        return self._files(record)[0]

    def finish(self, folder: RunFolder, record: RunRecord) -> None:
        """Pictures, the last commit, and the summary that ends the log."""
        from utils.plots import save_plots

        files, metrics = self._files(record)
        with tempfile.TemporaryDirectory() as drawn:
            save_plots(Path(drawn), metrics)
            files |= {f"Results/{path.name}": path.read_bytes() for path in sorted(Path(drawn).glob("*.png"))}
        folder.commit(files, complete=True)
        _log.info("\n%s\n", summary_table(metrics["teacher"], metrics["student"]))
        for line in summary_lines(metrics["student"]):
            _log.info("%s", line)

    def _files(self, record: RunRecord) -> tuple[dict[str, bytes], dict[str, Any]]:
        parts = self.parts
        return record.files(
            settings=self.config.result_settings(),
            settings_hash=self.config.settings_hash(),
            num_tasks=parts.num_tasks,
            classes=[parts.stream.classes(task) for task in range(parts.num_tasks)],
            parameters=parts.parameter_counts(),
            environment=self.environment,
            peak_memory_mb=peak_memory_mb(),
            data=data_identity(parts.stream),
        )


def data_identity(stream: TaskStream) -> dict[str, Any]:
    """What tells the stream's data set from another of the same name; the seed and the order of classes do not."""
    names = json.dumps(sorted(stream.class_names), ensure_ascii=False)
    return {
        "split": stream.split,
        "classes": stream.num_classes,
        "class_names_sha256": hashlib.sha256(names.encode()).hexdigest(),
        "train_images": len(stream.train_images.used),
        "test_images": len(stream.test_images.used),
    }


def stream_facts(stream: TaskStream, identity: Mapping[str, str]) -> dict[str, Any]:
    """What a trained student needs to be used without its data set, and what tells two data sets apart."""
    return {
        "num_classes": stream.num_classes,
        "num_tasks": len(stream),
        "ranges": [list(stream.classes(task)) for task in range(len(stream))],
        "class_names": list(stream.class_names),
        "image_size": stream.image_size,
        "test_crop": stream.test_transform.crop,
        "train_images": [stream.train_size(task) for task in range(len(stream))],
        "test_images": [stream.test_size(task) for task in range(len(stream))],
        "backbone_sha256": dict(identity),
    }


def write_facts(facts: Mapping[str, Any]) -> bytes:
    """The content of ``classes.json``."""
    return (json.dumps(facts, ensure_ascii=False, indent=1) + "\n").encode()


def require_same(facts: Mapping[str, Any], folder: RunFolder) -> None:
    """Compare facts (some or all of :func:`stream_facts`) with those that a run wrote down.

    Raises:
        ConfigError: naming what differs.
    """
    before = json.loads(folder.read(CLASSES))
    problems = [f"{key} differ" for key in facts if key != "backbone_sha256" and before.get(key) != facts[key]]
    for role, digest in facts["backbone_sha256"].items():
        was = before["backbone_sha256"].get(role)
        if was != digest:
            problems.append(f"the SHA-256 of the {role}'s backbone was {was} and is {digest}, see --{role[0]}_weights")
    if problems:
        raise ConfigError([
            f"--log_dir {folder.root} holds a run on other data or backbones ({'; '.join(problems)}): use the same "
            "files, or another log_dir"
        ])  # fmt: skip
