"""Frozen backbones by name: the project's own, timm's vision transformers, and weights from a file."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import timm
import torch
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from models import mini_vit
from models.pretrained import (
    HUB_FILES,
    address_problem,
    cached_file,
    full_name,
    how_to_get,
    hub_repository,
    missing_weights,
    shipped_file,
)
from models.sizes import OWN_MODELS, ViTSize, name_problem
from models.vit import PromptedViT, UnsupportedBackboneError
from models.weight_files import (
    WeightsError,
    check_fit,
    file_kind,
    first_line,
    read_tensors,
    some,
    unwrap,
)
from utils.checkpoint import sha256_of

LOG = logging.getLogger(__name__)
# Classifiers, and what pre-training adds beside the encoder; no backbone here has them.
_IGNORED = re.compile(r"(head|head_dist|head_drop|fc|pre_logits|mask_token|logit_scale|logit_bias)(\.|$)")


class BackboneError(ValueError):
    """A backbone that cannot be built, or weights that do not fit it, said in one sentence."""


class Backbone(NamedTuple):
    """A frozen backbone and where its weights are from.

    Attributes:
        vit: the backbone.
        tag: its full name: ``architecture.tag``, the project's own name, or the architecture alone where the
            user gave the weights.
        sha256: of the file with the weights; "" for random ones.
        source: that file, or ``"random"``.
    """

    vit: PromptedViT
    tag: str
    sha256: str
    source: str


def load_backbone(name: str, *, weights: Path | None = None, pretrained: bool = True) -> Backbone:
    """Build a frozen backbone.

    Args:
        name: ``mini_vit_base``, ``mini_vit_small``, or a timm ``VisionTransformer`` with or without tag; the
            paper's bare names mean their ``augreg_in21k_ft_in1k`` weights.
        weights: ``.pth``, ``.safetensors`` or Google's ``.npz`` with the weights, instead of timm's own.
        pretrained: False for random weights (timm's initialisation from torch's global generator), for tests
            and benchmarks.

    Raises:
        BackboneError: the name, the file or the kind of model cannot be used, or the weights are nowhere.
    """
    problem = name_problem(name) or address_problem(name)
    if problem:
        raise BackboneError(problem)
    full = full_name(name)
    if not pretrained:
        return Backbone(_prompted(name, _create(full, "cpu")), full, "", "random")
    _prompted(name, _create(full, "meta"))  # refuse what cannot be used before any download
    problem = missing_weights(name, weights)
    if problem:
        raise BackboneError(problem)
    path = weights or shipped_file(name) or cached_file(name) or _download(name)
    try:
        vit = _load(full, path, strange=weights is not None)
    except WeightsError as error:
        raise BackboneError(str(error)) from error
    tag = full if weights is None else full.partition(".")[0]
    LOG.info("weights of %s from %s", tag, path)
    return Backbone(_prompted(name, vit), tag, sha256_of(path), str(path))


def check_pair(teacher: PromptedViT, student: PromptedViT) -> None:
    """Raise :class:`BackboneError` when teacher and student cannot see the same images."""
    if teacher.image_size != student.image_size:
        raise BackboneError(
            f"the teacher takes images of {teacher.image_size} px and the student of {student.image_size} px,"
            " but both see the same images: choose models of one input size"
        )


def size_of(vit: PromptedViT) -> ViTSize:
    """The sizes of a built backbone, for the checks of :mod:`models.sizes`."""
    patch = vit.image_size // vit.vit.patch_embed.grid_size[0]
    return ViTSize(vit.embed_dim, vit.depth, vit.num_heads, vit.image_size, patch, vit.num_tokens)


def _create(full: str, device: str) -> VisionTransformer:
    """A backbone without classifier; on ``"meta"`` it has shapes but no values."""
    with torch.device(device):
        if full in OWN_MODELS:
            return getattr(mini_vit, full)()
        try:
            return timm.create_model(full, pretrained=False, num_classes=0)
        except (RuntimeError, ValueError) as error:
            raise BackboneError(f"timm cannot build {full}: {first_line(error)}") from error


def _prompted(name: str, vit: nn.Module) -> PromptedViT:
    try:
        prompted = PromptedViT(vit)
    except UnsupportedBackboneError as error:
        raise BackboneError(f"{name} cannot be used: {error}") from error
    height, width = vit.patch_embed.img_size
    if height != width:
        raise BackboneError(f"{name} takes images of {height} x {width} pixels; choose one with square ones")
    return prompted


def _download(name: str) -> Path:
    """Fetch the weights from timm's repository into the hub's cache."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    repository = hub_repository(name)
    for file in HUB_FILES:
        try:
            return Path(hf_hub_download(repository, file))
        except Exception as error:  # the hub's client has dozens of its own and passes on those of its parts
            if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
                continue
            raise BackboneError(
                f"{repository} could not be fetched ({first_line(error)}); {how_to_get(name)}"
            ) from error
    raise BackboneError(f"{repository} holds none of {', '.join(HUB_FILES)}; {how_to_get(name)}")


def _load(full: str, path: Path, *, strange: bool) -> VisionTransformer:
    """Build ``full`` with the weights in ``path``; a ``strange`` file is one that may be of another model."""
    architecture = full.partition(".")[0]
    if file_kind(path) == "npz":
        return _load_npz(_create(full, "cpu"), path, architecture)
    vit = _create(full, "meta")
    state = _encoder(unwrap(read_tensors(path), path), path)
    if strange:
        _check_geometry(state, vit, path, architecture)
    # timm's own resampling rules; only weights from the hub are ever resampled.
    smooth = "flexi" not in full and "radio" not in full
    try:
        state = checkpoint_filter_fn(
            state,
            vit,
            adapt_layer_scale=any("gamma_" in key for key in state),
            interpolation="bicubic" if smooth else "bilinear",
            antialias=smooth,
        )
    except (RuntimeError, ValueError, KeyError, IndexError, AttributeError) as error:
        raise WeightsError(f"{path} does not fit {architecture}: {first_line(error)}") from error
    state = {key: value for key, value in state.items() if not _IGNORED.match(key)}
    check_fit(state, vit.state_dict(), path, architecture)
    vit.load_state_dict({key: _as_float32(value) for key, value in state.items()}, assign=True)
    return vit


def _as_float32(value: Tensor) -> Tensor:
    """A copy (the file under a mapped tensor may change), in float32 unless it counts something."""
    return value.to(torch.float32 if value.is_floating_point() else value.dtype, copy=True)


def _encoder(state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The part of a state dict under the prefix, if any, that stands before ``blocks.0``."""
    first = "blocks.0.norm1.weight"
    prefixes = [key.removesuffix(first) for key in state if key.endswith(first)]
    if len(prefixes) > 1:
        raise WeightsError(f"{path} holds several encoders ({', '.join(prefixes)}); save one of them alone")
    prefix = prefixes[0] if prefixes else ""
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _check_geometry(state: Mapping[str, Tensor], vit: VisionTransformer, path: Path, name: str) -> None:
    """Refuse patches or input sizes of another model, which timm's filter would resample silently."""
    kernel = state.get("patch_embed.proj.weight", state.get("visual.conv1.weight"))
    expected = vit.state_dict().get("patch_embed.proj.weight")
    if kernel is not None and expected is not None and kernel.shape[2:] not in ((), expected.shape[2:]):
        raise WeightsError(
            f"{path} does not fit {name}: its patches are of {kernel.shape[-1]} px, the model's of"
            f" {expected.shape[-1]} px"
        )
    positions = state.get("pos_embed", state.get("visual.positional_embedding"))
    if positions is None or vit.pos_embed is None:
        return
    count, expected = positions.shape[-2], vit.pos_embed.shape[1]
    if count not in (expected, expected + ("register_tokens" in state)):
        raise WeightsError(
            f"{path} does not fit {name}: it has {count} positions and the model {expected}, as for another"
            " input size"
        )


def _load_npz(vit: VisionTransformer, path: Path, name: str) -> VisionTransformer:
    """Google's format, by timm's reader.

    It copies what it looks for and does not mind the rest, so what stays NaN was not in the file.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            shapes = {re.sub("^(opt/target|params)/", "", key): archive[key].shape for key in archive}
    except Exception as error:  # see read_tensors
        raise WeightsError(f"{path} is damaged, or holds Python objects: {first_line(error)}") from error
    _check_npz(shapes, vit, path, name)
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.fill_(torch.nan)
    try:
        vit.load_pretrained(str(path))
    except (KeyError, ValueError, RuntimeError, IndexError, TypeError, AttributeError) as error:
        raise WeightsError(f"{path} does not fit {name}: {first_line(error)}") from error
    missing = [key for key, parameter in vit.named_parameters() if parameter.isnan().any()]
    if missing:
        raise WeightsError(f"{path} does not fit {name}: it lacks {some(missing, 'tensors')}")
    return vit


def _check_npz(shapes: Mapping[str, tuple[int, ...]], vit: VisionTransformer, path: Path, name: str) -> None:
    """Refuse another depth, patch or input size, which timm's reader would cut or resample silently."""
    blocks = {match[1] for key in shapes if (match := re.match(r"Transformer/encoderblock_(\d+)/", key))}
    found = {
        "blocks": len(blocks),
        "px a patch": shapes.get("embedding/kernel", (0,))[0],
        "positions": shapes.get("Transformer/posembed_input/pos_embedding", (0, 0))[1],
    }
    wanted = {
        "blocks": len(vit.blocks),
        "px a patch": vit.patch_embed.patch_size[0],
        "positions": vit.pos_embed.shape[1] if vit.pos_embed is not None else 0,
    }
    for what, number in found.items():
        if number and number != wanted[what]:
            raise WeightsError(
                f"{path} does not fit {name}: it has {number} {what}, the model {wanted[what]}"
            )
