"""``--teacher_from``: the teachers of another run, which each KD method would train to the same bits again."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from learners.evaluate import model_file
from utils.checkpoint import CLASSES, METRICS, RunFolder, RunFolderError, from_bytes
from utils.config import Config, ConfigError

# Settings of the student and its KD method, which the teacher never meets; where to stop; and the places of files
# whose contents are compared instead.
_IRRELEVANT = ("KD_method", "kd_alpha", "Soft_T", "kd_prompt_param", "max_task", "t_weights", "s_weights")

_log = logging.getLogger(__name__)


class TrainedTeacher(NamedTuple):
    """The trained parts of a teacher after a task, and the mean of each loss term per epoch of that task."""

    model: dict[str, Tensor]
    losses: list[dict[str, float]]


class TeacherCache:
    """The trained teachers of another run, which may still be training.

    Args:
        config: settings of this run; ``config.teacher_from`` is the other run's ``log_dir``.
        info: this run's :func:`learners.results.data_info`.

    Raises:
        ConfigError: the teachers cannot be those of this run.
    """

    def __init__(self, config: Config, info: Mapping[str, Any]) -> None:
        self.root = config.teacher_from
        self.config = config
        self._folder = RunFolder(self.root)
        if self.root.resolve() == config.log_dir.resolve():
            raise ConfigError([f"--teacher_from: {self.root} is the log_dir of this run itself; name another run"])
        try:
            settings, self._info = self._folder.settings(), self._folder.read_json(CLASSES)
        except RunFolderError as error:
            raise ConfigError([f"--teacher_from: {error}"]) from error
        if changes := self._changes(settings):
            raise ConfigError(
                [
                    f"--teacher_from: the teachers of {self.root} were trained with other settings ({changes}): give "
                    "the same ones, or leave the flag out"
                ]
            )
        if "teacher" not in self._info["backbone_sha256"]:
            method = settings["KD_method"]
            raise ConfigError([f"--teacher_from: {self.root} has no teacher (--KD_method {method}); name another run"])
        if other := [key for key in info if self._info.get(key) != info[key]]:
            raise ConfigError(
                [
                    f"--teacher_from: the teachers of {self.root} were trained on other data or backbones "
                    f"({', '.join(other)} differ): use the same files, or leave the flag out"
                ]
            )

    def find(self, task: int) -> TrainedTeacher | None:
        """The teacher after ``task`` (from 0), or None where there is none (yet) that can be used."""
        if not (self.root / model_file("teacher", task)).exists():
            return None
        try:
            metrics = self._folder.read_json(METRICS)
            if self._changes(metrics["settings"]) or self._folder.read_json(CLASSES) != self._info:
                raise RunFolderError(f"{self.root} now holds another run than it did when this one started")
            if metrics["tasks_done"] <= task:  # its results are just being written
                return None
            model = from_bytes(self._folder.read(model_file("teacher", task)))
        except RunFolderError as error:
            _log.warning("--teacher_from: %s; the teacher is trained here", error)
            return None
        return TrainedTeacher(model, metrics["losses"]["teacher"][task])

    def _changes(self, theirs: Mapping[str, Any]) -> str:
        """Their settings that differ from this run's and that a teacher depends on."""
        return ", ".join(
            f"{key} {theirs.get(key)} there, {own} here"
            for key, own in self.config.result_settings().items()
            if key not in _IRRELEVANT and theirs.get(key) != own
        )
