"""``--teacher_from``: the teachers of another run, which each KD method would train to the same bits again."""

import logging
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from learners.results import model_file
from utils.checkpoint import CLASSES, METRICS, RunFolder, RunFolderError, from_bytes
from utils.config import Config, ConfigError

# Settings of the student's training alone, where to stop, and paths of files whose contents are compared instead.
_IRRELEVANT = ("KD_method", "kd_alpha", "Soft_T", "kd_prompt_param", "kd_param", "max_task", "t_weights", "s_weights")

_log = logging.getLogger(__name__)


class TeacherCache:
    """The trained teachers of the run in ``config.teacher_from``, which may still be training.

    ``info`` is this run's :func:`learners.results.data_info`. Raises ConfigError if the teachers do not fit this run.
    """

    def __init__(self, config: Config, info: Mapping[str, Any]) -> None:
        self.config, self.root = config, config.teacher_from
        self._folder = RunFolder(self.root)
        try:
            settings, self._info = self._folder.settings(), self._folder.read_json(CLASSES)
        except RunFolderError as error:
            raise ConfigError([f"--teacher_from: {error}"]) from error
        trained, problem = f"the teachers of {self.root} were trained", None
        if self.root.resolve() == config.log_dir.resolve():
            problem = f"{self.root} is the log_dir of this run itself; name another run"
        elif changes := self._changes(settings):
            problem = f"{trained} with other settings ({changes}): give the same ones, or leave the flag out"
        elif "teacher" not in self._info["backbone_sha256"]:
            problem = f"{self.root} has no teacher (--KD_method {settings['KD_method']}); name another run"
        elif other := ", ".join(key for key in info if self._info.get(key) != info[key]):
            problem = f"{trained} on other data or backbones ({other} differ): use the same files, or no --teacher_from"
        if problem:
            raise ConfigError([f"--teacher_from: {problem}"])

    def find(self, task: int) -> tuple[dict[str, Tensor], list[dict[str, float]]] | None:
        """Trained parts of the teacher after ``task``, its mean losses per epoch of it; None if not (yet) usable."""
        name = model_file("teacher", task)
        if not (self.root / name).exists():
            return None
        try:
            metrics = self._folder.read_json(METRICS)
            if self._changes(metrics["settings"]) or self._folder.read_json(CLASSES) != self._info:
                raise RunFolderError(f"{self.root} now holds another run than it did when this one started")
            if metrics["tasks_done"] <= task:  # its results are just being written
                return None
            return from_bytes(self._folder.read(name)), metrics["losses"]["teacher"][task]
        except RunFolderError as error:
            _log.warning("--teacher_from: %s; the teacher is trained here", error)
            return None

    def _changes(self, theirs: Mapping[str, Any]) -> str:
        """Settings that differ between the two runs and that a teacher depends on."""
        changes = {key: values for key, values in self.config.changes(theirs).items() if key not in _IRRELEVANT}
        return ", ".join(f"{key} {there} there, {here} here" for key, (there, here) in changes.items())
