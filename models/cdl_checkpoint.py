"""Checkpoints of the authors' implementation: ``T_class.pth`` (teacher) and ``S_class.pth`` (student).

They are state dicts of whole models, in which the trained parts have the same names as here. The backbones and the
query network are left out.
"""

import logging
import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from models.backbones import misfit, read_state
from utils.config import ConfigError

_log = logging.getLogger(__name__)

FILES = {"teacher": "T_class.pth", "student": "S_class.pth"}
# The trained parts of both models; the original's APT also holds projections that it never uses.
_MODEL = re.compile(r"(prompt\.(?![kv]_layer_proj)|last\.)")
_KD = re.compile(r"(kd_last|kd_prompt|project_t_s|ReviewKD_layers)\.")  # those of the KD methods, in the student


def find_checkpoint(path: Path, role: str) -> Path:
    """Find the file of one model (raises ConfigError if there is none).

    ``path`` is the file, its folder, or a folder with ``task-<i>`` or ``models/task-<i>``, of which the last counts.
    """
    for file in (path, path / FILES[role]):
        if file.is_file():
            return file
    found = [*path.glob(f"task-*/{FILES[role]}"), *path.glob(f"models/task-*/{FILES[role]}")]
    tasks = {file: file.parent.name.removeprefix("task-") for file in found}
    numbers = {file: int(task) for file, task in tasks.items() if task.isdecimal()}
    if not numbers:
        raise ConfigError(f"{path} holds no {FILES[role]}, nor does a task-<i> folder in it")
    return max(numbers, key=numbers.get)


def load_checkpoint(path: Path, role: str) -> dict[str, Tensor]:
    """Load the trained parts of one model; arguments are those of :func:`find_checkpoint`.

    Raises ConfigError if the file is missing or damaged, or holds Python objects or no trained parts.
    """
    file = find_checkpoint(path, role)
    state = read_state(file)
    if not any(_MODEL.match(key) for key in state):
        raise ConfigError(f"{file} holds no prompts and no head, so it is not a checkpoint of a prompted model")
    wanted = [key for key in state if _MODEL.match(key) or (role == "student" and _KD.match(key))]
    return {key: state[key] for key in wanted}


def fit_checkpoint(state: Mapping[str, Tensor], model_state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Leave out of ``state``, in float32, the parts of a KD method that the model does not have; the log names them.

    If names or shapes differ in another way, a ConfigError names ``path``.
    """
    unused = [key for key in state if _KD.match(key) and key not in model_state]
    if unused:
        _log.warning("%s: %s of another KD method left out", path, ", ".join(unused))
    state = {key: value for key, value in state.items() if key not in unused}
    if problem := misfit(state, model_state):
        advice = "learner, KD method, their parameters, backbones and classes must be those of the checkpoint"
        raise ConfigError(f"{path} does not fit the model: {problem}; {advice}")
    return {key: value.float() for key, value in state.items()}
