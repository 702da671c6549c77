"""Checkpoints of the authors' implementation: ``T_class.pth`` (teacher) and ``S_class.pth`` (student).

They are state dicts of whole models. The trained parts have the same names here, so that checkpoints of this
project have the same format; the backbones and the query network beside them, and the ``module.`` of
DataParallel before every name, are left out.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from models.weight_files import WeightsError, check_fit, read_tensors, some, unwrap

LOG = logging.getLogger(__name__)

FILES = {"teacher": "T_class.pth", "student": "S_class.pth"}
# Trained parts of both models, and of the student alone (those of the KD methods).
_MODEL = re.compile(r"(prompt|last)\.")
_KD = re.compile(r"(kd_last|kd_prompt|project_t_s|ReviewKD_layers)\.")
_TASK = re.compile(r"task-(\d+)")


class OriginalError(ValueError):
    """A checkpoint that cannot be used, said in one sentence."""


def find_original(path: Path, role: str) -> Path:
    """The file of one model.

    Args:
        path: the file itself, the folder it lies in, or one with folders ``task-<i>`` or ``models/task-<i>``,
            of which the last task counts.
        role: ``"teacher"`` or ``"student"``.

    Raises:
        OriginalError: there is none.
    """
    if path.is_file():
        return path
    folders = [path, *_by_task(path), *_by_task(path / "models")]
    for folder in folders:
        if (folder / FILES[role]).is_file():
            return folder / FILES[role]
    raise OriginalError(f"{path} holds no {FILES[role]}, nor does a task-<i> folder in it")


def load_original(path: Path, role: str) -> dict[str, Tensor]:
    """The trained parts of one model, by the names of :meth:`learners.prompt.PromptLearner.state`.

    Args:
        path: see :func:`find_original`.
        role: ``"teacher"`` or ``"student"``.

    Raises:
        OriginalError: the file is missing or damaged, holds Python objects, or holds no trained parts.
    """
    file = find_original(path, role)
    try:
        state = unwrap(read_tensors(file), file)
    except WeightsError as error:
        raise OriginalError(str(error)) from error
    wanted = [key for key in state if _MODEL.match(key) or (role == "student" and _KD.match(key))]
    if not any(_MODEL.match(key) for key in wanted):
        raise OriginalError(f"{file} holds no prompts and no head; it is no checkpoint of a prompted model")
    return {key: state[key].to(torch.float32, copy=True) for key in wanted}


def fit_original(state: Mapping[str, Tensor], model: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """What of a checkpoint a model takes: all that the model has, and nothing else.

    Args:
        state: what :func:`load_original` returned.
        model: the model's own state.
        path: where ``state`` is from, for the message.

    Returns:
        ``state`` without the parts of a KD method that the model does not use, which the log mentions.

    Raises:
        OriginalError: something that the model has is missing or has another shape (another learner, KD method,
            ``--prompt_param``, backbone or number of classes).
    """
    unused = [key for key in state if _KD.match(key) and key not in model]
    if unused:
        LOG.warning("%s: %s of another KD method left out", path, some(unused, "tensors"))
    state = {key: value for key, value in state.items() if key not in unused}
    try:
        check_fit(state, model, path, "the model")
    except WeightsError as error:
        raise OriginalError(
            f"{error}; learner, KD method, their parameters, backbones and classes must be those of the checkpoint"
        ) from error
    return state


def _by_task(folder: Path) -> list[Path]:
    """The folders ``task-<i>`` in ``folder``, the last task first."""
    found = [child for child in folder.glob("task-*") if _TASK.fullmatch(child.name)]
    return sorted(found, key=lambda child: int(child.name.removeprefix("task-")), reverse=True)
