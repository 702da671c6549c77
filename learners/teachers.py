"""``--teacher_from``: the teachers of another run, which for each KD method would be trained to the same bits again."""

from __future__ import annotations

import json
import logging
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

    Args:
        root: the other run's ``--log_dir``.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def problems(self, config: Config) -> list[str]:
        """Why the teachers cannot be those of a run with the settings ``config``; loads no torch."""
        import yaml

        try:
            folder = self._open()
            theirs = yaml.safe_load(folder.read(ARGS))
        except RunFolderError as error:
            return [f"--teacher_from: {error}"]
        method = theirs.get("KD_method")
        if method in DISTILLERS and not DISTILLERS[method].needs_teacher:
            return [f"--teacher_from: {self.root} has no teacher (--KD_method {method}); name another run"]
        own = config.result_settings()
        changes = [
            f"{key} {theirs.get(key)} there, {own[key]} here"
            for key in own
            if key not in _OF_NO_MEANING and theirs.get(key) != own[key]
        ]
        if changes:
            return [
                f"--teacher_from: the teachers of {self.root} were trained with other settings ({', '.join(changes)}):"
                " give the same ones, or leave the flag out"
            ]
        return []

    def differences(self, facts: Mapping[str, Any]) -> list[str]:
        """Why they cannot be those of a run on the data and backbones ``facts`` (see ``learners.record``)."""
        try:
            theirs = json.loads(self._open().read(CLASSES))
        except RunFolderError as error:
            return [f"--teacher_from: {error}"]
        other = [key for key in facts if theirs.get(key) != facts[key]]
        if other:
            return [
                f"--teacher_from: the teachers of {self.root} were trained on other data or backbones"
                f" ({', '.join(other)} differ): use the same files, or leave the flag out"
            ]
        return []

    def find(self, task: int) -> TrainedTeacher | None:
        """The teacher after ``task`` (from 0), or None where there is none (yet) or it is damaged."""
        name = f"models/task-{task + 1}/T_class.pth"
        try:
            folder = self._open()
            if name not in folder.files:
                return None
            losses = json.loads(folder.read(_METRICS))["losses"]["teacher"][task]
            return TrainedTeacher(folder.read(name), losses)
        except RunFolderError as error:
            _log.warning("--teacher_from: %s; the teacher is trained here", error)
            return None

    def _open(self) -> RunFolder:
        folder = RunFolder(self.root)
        folder.open(read_only=True)
        return folder
