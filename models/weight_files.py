"""Files with tensors that somebody else made: read without running code, refused in one sentence."""

from __future__ import annotations

import argparse
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

# What training scripts put around a state dict, and what DataParallel and torch.compile put before its names.
_WRAPPERS = ("state_dict", "model", "model_state_dict")
_PREFIX = re.compile(r"^((module|_orig_mod)\.)*")


class WeightsError(ValueError):
    """A file that cannot be used, said in one sentence."""


def read_tensors(path: Path) -> Mapping[str, object]:
    """What a ``.pth`` or ``.safetensors`` file holds, without running code from it.

    Raises:
        WeightsError: the file is no such file, is damaged, or holds Python objects beside tensors.
    """
    kind = file_kind(path)
    try:
        if kind == "safetensors":
            return safetensors.torch.load_file(path)
        # timm and DeiT save the arguments of their scripts along with the weights.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the errors below say all that matters to a user
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=kind == "zip")
    except pickle.UnpicklingError as error:
        if "global" not in str(error).lower():
            raise WeightsError(
                f"{path} is damaged, or a pickle that torch.save did not write, which is not loaded because that"
                " could run code"
            ) from error
        raise WeightsError(
            f"{path} holds Python objects besides tensors{_objects(path)}, which are not loaded because that"
            " could run code; save its state dict alone"
        ) from error
    except Exception as error:  # what a damaged pickle or archive can raise has no end
        if "TorchScript" in str(error):
            raise WeightsError(f"{path} is a TorchScript program; save its state dict alone") from error
        raise WeightsError(f"{path} is damaged or cut short: {first_line(error)}") from error
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path} holds a {type(content).__name__} instead of a state dict")
    return content


def unwrap(content: Mapping[str, object], path: Path) -> dict[str, Tensor]:
    """The state dict in what a training script saved.

    Wrappers (``state_dict``, ``model``) and prefixes (``module.``, ``_orig_mod.``) are taken off; what is no
    tensor is left out.

    Raises:
        WeightsError: there are no tensors.
    """
    while wrapper := next((key for key in _WRAPPERS if isinstance(content.get(key), Mapping)), None):
        content = content[wrapper]
    state = {_PREFIX.sub("", str(key)): v for key, v in content.items() if isinstance(v, Tensor)}
    if not state:
        raise WeightsError(f"{path} holds no tensors")
    return state


def check_fit(state: Mapping[str, Tensor], model: Mapping[str, Tensor], path: Path, name: str) -> None:
    """Raise :class:`WeightsError` unless names and shapes are those of the model."""
    missing = [key for key in model if key not in state]
    if len(missing) == len(model):
        raise WeightsError(f"{path} holds no weights of {name}: no tensor in it has a name that {name} knows")
    shapes = [
        f"{key} is {_shape(state[key])}, not {_shape(model[key])}"
        for key in model
        if key in state and state[key].shape != model[key].shape
    ]
    if shapes:
        raise WeightsError(f"{path} does not fit {name}: {some(shapes, 'tensors of another shape')}")
    if missing:
        raise WeightsError(f"{path} does not fit {name}: it lacks {some(missing, 'tensors')}")
    unknown = [key for key in state if key not in model]
    if unknown:
        raise WeightsError(f"{path} does not fit {name}: the model has no {some(unknown, 'tensors')}")


def file_kind(path: Path) -> str:
    """``npz``, ``zip`` (torch), ``pickle`` (torch before 1.6) or ``safetensors``, by the content of a file.

    Raises:
        WeightsError: it is none of these.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(512)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}") from error
    if not start:
        raise WeightsError(f"{path} is empty; fetch it again")
    if start.lstrip().startswith(b"<"):
        raise WeightsError(f"{path} is a web page, not weights; fetch the file that the page links to")
    if start.startswith(b"version https://git-lfs"):
        raise WeightsError(f"{path} only stands for a file in Git LFS; fetch the file itself (git lfs pull)")
    if start.startswith(b"PK"):
        try:
            with zipfile.ZipFile(path) as archive:
                return "npz" if any(name.endswith(".npy") for name in archive.namelist()) else "zip"
        except Exception as error:  # see read_tensors
            raise WeightsError(f"{path} is damaged or cut short; fetch it again") from error
    if start.startswith(b"\x80"):
        return "pickle"
    if start[8:9] == b"{":
        return "safetensors"
    raise WeightsError(f"{path} is no file with weights (.pth, .safetensors or .npz)")


def _objects(path: Path) -> str:
    """The Python objects that a pickle asks for, in brackets, where torch can tell them."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # only more detail for an error that is raised anyway
        names = []
    return f" ({', '.join(names[:3])})" if names else ""


def _shape(value: Tensor) -> str:
    return "x".join(map(str, value.shape)) or "a number"


def some(items: Iterable[str], what: str) -> str:
    """The only item, or how many there are and the first of them."""
    items = list(items)
    return items[0] if len(items) == 1 else f"{len(items)} {what}, such as {items[0]}"


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its kind when it has none."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
