"""``--teacher_from``: the teachers of another run, which for each KD method would be trained to the same bits again."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from learners.distillers import DISTILLERS
from learners.opening import ARGS, CLASSES
from utils.checkpoint import RunFolder, RunFolderError
from utils.config import Config

# Settings of the student and its KD method, which the teacher never meets; where to stop; and the places of files
# whose contents are compared instead.
_OF_NO_MEANING = ("KD_method", "kd_alpha", "Soft_T", "kd_prompt_param", "max_task", "t_weights", "s_weights")
_METRICS = "Results/metrics.json"
# A run that is going on replaces several files at once, which takes a moment in which they do not fit its manifest.
_TRIES, _PAUSE_S = 3, 0.2

_log = logging.getLogger(__name__)


class TrainedTeacher(NamedTuple):
    """A teacher after a task.

    Attributes:
        model: content of its ``T_class.pth``.
        losses: mean of each term, per epoch of that task.
    """

    model: bytes
    losses: list[dict[str, float]]


class TrainedTeachers:
    """What a run folder has of trained teachers, now; the run may still be going on.

    What :meth:`problems` and :meth:`differences` have compared must still hold when :meth:`find` takes a teacher:
    another run may have been started in the folder since.

    Args:
        root: the other run's ``--log_dir``.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._own_settings: dict[str, Any] = {}
        self._classes: str | None = None

    def problems(self, config: Config) -> list[str]:
        """Why the teachers cannot be those of a run with the settings ``config``; loads no torch."""
        import yaml

        if config.log_dir is not None and self.root.resolve() == config.log_dir.resolve():
            return [f"--teacher_from: {self.root} is the log_dir of this run itself; name another run"]
        try:
            folder = self._open()
            theirs = yaml.safe_load(folder.read(ARGS))
        except RunFolderError as error:
            return [f"--teacher_from: {error}"]
        method = theirs.get("KD_method")
        if method in DISTILLERS and not DISTILLERS[method].needs_teacher:
            return [f"--teacher_from: {self.root} has no teacher (--KD_method {method}); name another run"]
        self._own_settings = config.result_settings()
        changes = self._changes(theirs)
        if changes:
            return [
                f"--teacher_from: the teachers of {self.root} were trained with other settings ({', '.join(changes)}):"
                " give the same ones, or leave the flag out"
            ]
        return []

    def differences(self, facts: Mapping[str, Any]) -> list[str]:
        """Why they cannot be those of a run on the data and backbones ``facts`` (see ``learners.record``)."""
        try:
            folder = self._open()
            theirs = json.loads(folder.read(CLASSES))
        except RunFolderError as error:
            return [f"--teacher_from: {error}"]
        other = [key for key in facts if theirs.get(key) != facts[key]]
        if other:
            return [
                f"--teacher_from: the teachers of {self.root} were trained on other data or backbones"
                f" ({', '.join(other)} differ): use the same files, or leave the flag out"
            ]
        self._classes = folder.files[CLASSES]
        return []

    def find(self, task: int) -> TrainedTeacher | None:
        """The teacher after ``task`` (from 0), or None where there is none (yet), or none that can be used."""
        problem = ""
        for attempt in range(_TRIES):
            if attempt:
                time.sleep(_PAUSE_S)
            try:
                return self._read(task)
            except RunFolderError as error:
                problem = str(error)
        _log.warning("--teacher_from: %s; the teacher is trained here", problem)
        return None

    def _read(self, task: int) -> TrainedTeacher | None:
        name = f"models/task-{task + 1}/T_class.pth"
        folder = self._open()
        if name not in folder.files:
            return None
        metrics = json.loads(folder.read(_METRICS))
        if self._changes(metrics["settings"]) or folder.files.get(CLASSES) != self._classes:
            raise RunFolderError(f"{self.root} now holds another run than it did when this one started")
        return TrainedTeacher(folder.read(name), metrics["losses"]["teacher"][task])

    def _changes(self, theirs: Mapping[str, Any]) -> list[str]:
        """What their settings have other than this run's that a teacher depends on."""
        return [
            f"{key} {theirs.get(key)} there, {own} here"
            for key, own in self._own_settings.items()
            if key not in _OF_NO_MEANING and theirs.get(key) != own
        ]

    def _open(self) -> RunFolder:
        folder = RunFolder(self.root)
        folder.open(read_only=True)
        return folder
