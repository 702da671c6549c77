"""The state of a run in few bytes: only what differs from a base that can be had again.

Prompt methods train a small part of their tensors in each task, and an optimizer's moments of the rest stay
zero. Saved are therefore the rows (along the first dimension) that differ, bit for bit, from the *base*: the
models as they were when the task began, and zero for everything else. That makes a state small enough to be
written after every epoch, even where epochs are short.

The bytes are the length of a JSON text (8 bytes, little-endian), the text, and the rows of all tensors in the
order in which the text mentions them. Reading them runs no code, whoever wrote them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

_TENSOR = "tensor:"  # marks the description of a tensor
_ITEMS = "items:"  # marks a mapping whose keys are not all strings, as JSON demands


class Described(NamedTuple):
    """A part of a state that does not change for a while: what :func:`describe` has made of it.

    Attributes:
        tree: plain data, with descriptions in the place of tensors.
        rows: the bytes of their rows, in the order in which the tree mentions them.
    """

    tree: Any
    rows: list[bytes]


def describe(tree: Any, base: Any = None) -> Described:
    """A part of a state, ready to be a node of what :func:`pack` is given; see there."""
    rows: list[bytes] = []
    return Described(_describe(tree, base, rows, ""), rows)


def pack(tree: Any, base: Any = None) -> bytes:
    """Nested dicts and lists of tensors, numbers and strings as bytes (tuples come back as lists).

    Args:
        tree: what to save; may contain :class:`Described` parts.
        base: nested in the same way; tensors that it lacks count as zero.

    Raises:
        ValueError: a tensor is not finite where it differs from its base; or they differ in type or shape.
    """
    tree, rows = describe(tree, base)
    text = json.dumps(tree).encode()
    return b"".join([len(text).to_bytes(8, "little"), text, *rows])


def unpack(data: bytes, base: Any = None) -> Any:
    """What :func:`pack` saved with an equal ``base``, on the CPU."""
    start = 8 + int.from_bytes(data[:8], "little")
    return _Reader(data, start).rebuild(unpack_plain(data), base)


def unpack_plain(data: bytes) -> Any:
    """The tree that :func:`pack` saved, with descriptions in the place of tensors; needs no base."""
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def copy_to_cpu(tree: Any) -> Any:
    """A copy of nested containers with every tensor on the CPU, with a storage of its own."""
    if isinstance(tree, Tensor):
        return tree.detach().to("cpu", copy=True).contiguous()
    if isinstance(tree, dict):
        return {key: copy_to_cpu(item) for key, item in tree.items()}
    if isinstance(tree, list | tuple):
        return [copy_to_cpu(item) for item in tree]
    return tree


def _describe(tree: Any, base: Any, rows: list[bytes], path: str) -> Any:
    """``tree`` as JSON writes it, with a description in the place of each tensor, whose bytes go to ``rows``."""
    if isinstance(tree, Tensor):
        return {_TENSOR: _describe_tensor(tree, base, rows, path)}
    if isinstance(tree, Described):
        rows += tree.rows
        return tree.tree
    if isinstance(tree, dict):
        items = {key: _describe(item, _child(base, key), rows, f"{path} {key}") for key, item in tree.items()}
        return items if all(type(key) is str for key in items) else {_ITEMS: list(items.items())}
    if isinstance(tree, list | tuple):
        return [_describe(item, _child(base, index), rows, f"{path} {index}") for index, item in enumerate(tree)]
    return tree


def _describe_tensor(tensor: Tensor, base: Tensor | None, rows: list[bytes], path: str) -> dict[str, Any]:
    if base is not None and (base.dtype, base.shape) != (tensor.dtype, tensor.shape):
        raise ValueError(f"{path.strip()} changed its type or shape since the base")
    values = _rows(tensor)
    differing = np.flatnonzero((values != (0 if base is None else _rows(base))).any(1))
    whole = len(differing) == len(values)
    values = values if whole else values[differing]
    if tensor.dtype == torch.float32 and not np.isfinite(values.view(np.float32)).all():
        raise ValueError(f"{path.strip()} is not finite")
    rows.append(values.tobytes())
    return {
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
        "rows": None if whole else differing.tolist(),
        "size": len(rows[-1]),
    }


class _Reader:
    """Rebuilds a tree, taking the tensors from ``data`` in the order in which they were written."""

    def __init__(self, data: bytes, start: int) -> None:
        self.data = data
        self.at = start

    def rebuild(self, tree: Any, base: Any) -> Any:
        if isinstance(tree, list):
            return [self.rebuild(item, _child(base, index)) for index, item in enumerate(tree)]
        if not isinstance(tree, Mapping):
            return tree
        if _TENSOR in tree:
            return self._tensor(base, **tree[_TENSOR])
        items = tree[_ITEMS] if _ITEMS in tree else tree.items()
        return {key: self.rebuild(item, _child(base, key)) for key, item in items}

    def _tensor(self, base: Tensor | None, dtype: str, shape: list[int], rows: list[int] | None, size: int) -> Tensor:
        kind = getattr(torch, dtype)
        content = bytearray(self.data[self.at : self.at + size])
        values = torch.frombuffer(content, dtype=kind) if size else torch.empty(0, dtype=kind)
        self.at += size
        if rows is None:
            return values.view(shape)
        whole = torch.zeros(shape, dtype=kind) if base is None else copy_to_cpu(base)
        if rows:
            _as_rows(whole)[rows] = values.view(len(rows), -1)
        return whole


def _as_rows(tensor: Tensor) -> Tensor:
    """[first dimension, all others] of a contiguous tensor; a scalar is one row."""
    return tensor.flatten(1) if tensor.dim() > 1 else tensor.view(-1, 1)


def _rows(tensor: Tensor) -> np.ndarray:
    """The bytes of each row as integers, as wide ones as fit: comparing these is exact (-0.0, NaN) and fast."""
    as_bytes = _as_rows(tensor.detach().cpu().contiguous()).view(torch.uint8).numpy()
    width = as_bytes.shape[1]
    return as_bytes.view(np.int64 if width % 8 == 0 else np.int32 if width % 4 == 0 else np.uint8)


def _child(base: Any, key: Any) -> Any:
    if isinstance(base, dict):
        return base.get(key)
    if isinstance(base, list | tuple) and isinstance(key, int) and key < len(base):
        return base[key]
    return None
