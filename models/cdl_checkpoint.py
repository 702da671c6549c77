"""Checkpoints of the authors' implementation: ``T_class.pth`` (teacher) and ``S_class.pth`` (student).

They are state dicts of whole models. The trained parts have the same names here, so that checkpoints of this project
have the same format; the backbones and the query network beside them, and the ``module.`` of DataParallel before every
name, are left out.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from models.backbones import BackboneError, read_state

FILES = {"teacher": "T_class.pth", "student": "S_class.pth"}
# Trained parts of both models, and of the student alone (those of the KD methods).
_MODEL = re.compile(r"(prompt|last)\.")
_KD = re.compile(r"(kd_last|kd_prompt|project_t_s|ReviewKD_layers)\.")

_log = logging.getLogger(__name__)


class CheckpointError(ValueError):
    """A checkpoint that cannot be used, explained in one sentence."""


def find_checkpoint(path: Path, role: str) -> Path:
    """The file of one model.

    Args:
        path: the file itself, the folder it is in, or one with folders ``task-<i>`` or ``models/task-<i>``,
            of which the last task counts.
        role: ``"teacher"`` or ``"student"``.

    Raises:
        CheckpointError: there is none.
    """
    if path.is_file():
        return path
    tasks = [folder for parent in (path, path / "models") for folder in parent.glob("task-*") if folder.is_dir()]
    numbers = {folder: folder.name.removeprefix("task-") for folder in tasks}
    tasks = sorted((folder for folder in tasks if numbers[folder].isdecimal()), key=lambda f: -int(numbers[f]))
    for folder in (path, *tasks):
        if (folder / FILES[role]).is_file():
            return folder / FILES[role]
    raise CheckpointError(f"{path} holds no {FILES[role]}, nor does a task-<i> folder in it")


def load_checkpoint(path: Path, role: str) -> dict[str, Tensor]:
    """The trained parts of one model, by the names of ``TeacherStudentLearner.state``.

    Args:
        path: see :func:`find_checkpoint`.
        role: ``"teacher"`` or ``"student"``.

    Raises:
        CheckpointError: the file is missing or damaged, holds Python objects, or holds no trained parts.
    """
    file = find_checkpoint(path, role)
    try:
        state = read_state(file)
    except BackboneError as error:
        raise CheckpointError(str(error)) from error
    if not any(_MODEL.match(key) for key in state):
        raise CheckpointError(f"{file} holds no prompts and no head; it is no checkpoint of a prompted model")
    return {
        key: value for key, value in state.items() if _MODEL.match(key) or (role == "student" and _KD.match(key))
    }


def fit_checkpoint(state: Mapping[str, Tensor], model: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The part of a checkpoint that a model takes, without the parts of KD methods that the model does not use.

    Args:
        state: result of :func:`load_checkpoint`.
        model: the model's own state.
        path: origin of ``state``, for the message.

    Raises:
        CheckpointError: something that the model has is missing or has another shape (another learner, KD method,
            ``--prompt_param``, backbone or number of classes).
    """
    unused = [key for key in state if _KD.match(key) and key not in model]
    state = {key: value for key, value in state.items() if key not in unused}
    shapes, expected = ({key: tuple(value.shape) for key, value in each.items()} for each in (state, model))
    different = sorted(key for key in shapes.keys() | expected.keys() if shapes.get(key) != expected.get(key))
    if different:
        key = different[0]
        raise CheckpointError(
            f"{path} does not fit the model: {len(different)} tensors differ, such as {key}, which is {shapes.get(key)} "
            f"in the file and {expected.get(key)} in the model; learner, KD method, their parameters, backbones and "
            "classes must be those of the checkpoint"
        )
    if unused:
        _log.warning("%s: %d tensors of another KD method left out, such as %s", path, len(unused), unused[0])
    return state
