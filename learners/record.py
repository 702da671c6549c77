"""What a run has measured so far, and the result files made from it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dataloaders.tasks import TaskStream
from utils.metrics import AccuracyMatrix, acc_csv, build_metrics, metrics_json

TEACHER_ACCURACY, STUDENT_ACCURACY = "Results/acc.csv", "Results/acc_s.csv"
METRICS, TIMING = "Results/metrics.json", "Results/timing.json"
CLASSES = "classes.json"


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

    def state(self) -> dict[str, Any]:
        return dict(vars(self))

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> RunRecord:
        return cls(**state)

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


def stream_facts(stream: TaskStream, identity: Mapping[str, str]) -> bytes:
    """What a trained student needs to be used without its data set: ``classes.json``."""
    facts = {
        "num_classes": stream.num_classes,
        "num_tasks": len(stream),
        "ranges": [list(stream.classes(task)) for task in range(len(stream))],
        "class_names": list(stream.class_names),
        "image_size": stream.image_size,
        "test_crop": stream.test_transform.crop,
        "backbone_sha256": dict(identity),
    }
    return (json.dumps(facts, ensure_ascii=False, indent=1) + "\n").encode()
