"""Frozen backbones by name: timm's vision transformers and the project's own, with weights from the hub or a file."""

from __future__ import annotations

import argparse
import logging
import os
import socket
import urllib.request
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np
import timm
import torch
from huggingface_hub import constants, try_to_load_from_cache
from timm.models import load_state_dict

from models import mini_vit
from models.sizes import OWN_MODELS, PAPER_NAMES, ViTSize, name_problem
from models.vit import PromptedViT, UnsupportedBackboneError
from utils.checkpoint import sha256_of

PAPER_TAG = "augreg_in21k_ft_in1k"
HUB_FILES = ("model.safetensors", "pytorch_model.bin")

_log = logging.getLogger(__name__)


class BackboneError(ValueError):
    """A backbone that cannot be built, or weights that do not fit it, explained in one sentence."""


class Backbone(NamedTuple):
    """A frozen backbone and the origin of its weights.

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
        BackboneError: the name, the file or the kind of model cannot be used, or there are no weights.
    """
    if problem := name_problem(name):
        raise BackboneError(problem)
    full = full_name(name)
    try:
        with torch.device("meta"):
            PromptedViT(_create(full))  # refuses models that cannot be used before any download
    except UnsupportedBackboneError as error:
        raise BackboneError(f"{name} cannot be used: {error}") from error
    if not pretrained:
        return Backbone(PromptedViT(_create(full)), full, "", "random")
    file = weights or (mini_vit.weights_path(name) if name in OWN_MODELS else cached_file(full))
    if file is None:
        vit, file = _download(full)
    else:
        vit = _load(full, file)
    tag = full if weights is None else full.partition(".")[0]
    _log.info("weights of %s from %s", tag, file)
    return Backbone(PromptedViT(vit), tag, sha256_of(file), str(file))


def full_name(name: str) -> str:
    """The name with its tag, ``architecture.tag``.

    The paper's bare names mean their ``augreg_in21k_ft_in1k`` weights, other bare names timm's default.
    """
    if name in PAPER_NAMES:
        return f"{name}.{PAPER_TAG}"
    if name in OWN_MODELS or "." in name:
        return name
    config = timm.get_pretrained_cfg(name)
    return f"{config.architecture}.{config.tag}" if config.tag else name


def size_of(vit: PromptedViT) -> ViTSize:
    """The sizes of a built backbone, for the checks that its name alone did not allow."""
    patch = vit.vit.patch_embed.patch_size[0]
    return ViTSize(vit.embed_dim, vit.depth, vit.num_heads, vit.image_size, patch, vit.num_tokens)


def cached_file(full: str) -> Path | None:
    """The weights of ``full`` in the local cache of the Hugging Face hub, or None."""
    repository = timm.get_pretrained_cfg(full).hf_hub_id
    found = (try_to_load_from_cache(repository, name) for name in HUB_FILES if repository)
    return next((Path(path) for path in found if isinstance(path, str)), None)


def _create(full: str, **options: Any) -> torch.nn.Module:
    """A backbone without classifier, random unless ``options`` of timm say otherwise."""
    if full in OWN_MODELS:
        return getattr(mini_vit, full)()
    return timm.create_model(full, num_classes=0, **options)


def _download(full: str) -> tuple[torch.nn.Module, Path]:
    """Let timm fetch the weights from the hub."""
    repository = timm.get_pretrained_cfg(full).hf_hub_id
    if not repository:
        raise BackboneError(f"timm has no weights for {full} on the hub; give a file (--t_weights/--s_weights FILE)")
    try:
        if not constants.HF_HUB_OFFLINE and not urllib.request.getproxies():
            # Without a network the hub's client would try again for a minute.
            socket.create_connection((urlsplit(constants.ENDPOINT).hostname, 443), timeout=5).close()
        return _create(full, pretrained=True), cached_file(full)
    except Exception as error:  # the hub's client has dozens of its own and passes on those of its parts
        raise BackboneError(
            f"the weights of {full} are not on this machine and could not be fetched ({_first_line(error)}); on a "
            f"machine with network get https://huggingface.co/{repository}/resolve/main/{HUB_FILES[0]} and pass the "
            "file by --t_weights/--s_weights FILE"
        ) from error


def _load(full: str, file: Path) -> torch.nn.Module:
    """A backbone with the weights in ``file``, read by timm without running code."""
    architecture = full.partition(".")[0]
    try:
        if file.suffix == ".npz":
            with np.load(file) as archive:
                _check_archive({key: archive[key].shape for key in archive}, _create(full))
            return _create(full, pretrained=True, pretrained_cfg_overlay={"file": str(file), "custom_load": True})
        state = read_state(file)
        if full in OWN_MODELS:
            vit = _create(full)
            vit.load_state_dict(state)
            return vit
        _check_geometry(state, _create(full))
        # timm is strict about names only where the classifier of file and model agree: neither has one.
        state = {key: value for key, value in state.items() if not key.startswith(("head", "fc.", "pre_logits"))}
        return _create(full, pretrained=True, pretrained_cfg_overlay={"state_dict": state, "num_classes": 0})
    except BackboneError:
        raise
    except Exception as error:  # a file of another model, or a damaged archive, can raise anything
        raise BackboneError(f"{file} does not fit {architecture}, or is damaged: {_first_line(error)}") from error


def read_state(file: Path) -> dict[str, torch.Tensor]:
    """The state dict in a ``.pth`` or ``.safetensors`` file, in float32; code in it is never run.

    It may be under ``state_dict`` or ``model``, with the prefix ``module.`` of DataParallel.

    Raises:
        BackboneError: the file is damaged, holds Python objects, or holds no tensors.
    """
    # DeiT saves the arguments of its script along with the weights.
    with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the errors say all that matters to a user
        try:
            content = load_state_dict(str(file))
        except Exception as error:  # see _load
            reason = "it is empty" if os.path.getsize(file) == 0 else _first_line(error)
            raise BackboneError(
                f"{file} is damaged, or holds Python objects besides tensors, which are not loaded because that could "
                f"run code ({reason}); fetch it again, or save its state dict alone"
            ) from error
    state = {key: value for key, value in content.items() if isinstance(value, torch.Tensor)}
    if not state:
        raise BackboneError(f"{file} holds no tensors")
    return {key: value.float() if value.is_floating_point() else value for key, value in state.items()}


def _check_geometry(state: Mapping[str, torch.Tensor], vit: torch.nn.Module) -> None:
    """Refuse patches or input sizes of another model, which timm would resample silently."""
    own = vit.state_dict()
    kernel = state.get("patch_embed.proj.weight", state.get("visual.conv1.weight"))
    positions = state.get("pos_embed", state.get("visual.positional_embedding"))
    if kernel is not None and kernel.shape[2:] != own["patch_embed.proj.weight"].shape[2:]:
        raise ValueError(f"its patches are of {kernel.shape[-1]} px, the model's of {vit.patch_embed.patch_size[0]} px")
    # DINOv2's own files have one position more than timm's, for the class token.
    if positions is not None and "pos_embed" in own:
        number, expected = positions.shape[-2] - ("register_tokens" in state), own["pos_embed"].shape[-2]
        if number != expected:
            raise ValueError(f"it has {number} positions and the model {expected}, as for another input size")


def _check_archive(shapes: Mapping[str, tuple[int, ...]], vit: torch.nn.Module) -> None:
    """Refuse another depth, patch or input size in Google's format, which timm would cut or resample silently."""
    found = {
        "blocks": len({key.split("/")[1] for key in shapes if "/encoderblock_" in key}),
        "px a patch": shapes["embedding/kernel"][0],
        "positions": shapes["Transformer/posembed_input/pos_embedding"][1],
    }
    wanted = {
        "blocks": len(vit.blocks),
        "px a patch": vit.patch_embed.patch_size[0],
        "positions": vit.pos_embed.shape[1],
    }
    for unit, number in found.items():
        if number != wanted[unit]:
            raise ValueError(f"it has {number} {unit}, the model {wanted[unit]}")


def _first_line(error: Exception) -> str:
    """An error's message in one short line, or its kind when it has none."""
    return " ".join(str(error).split())[:200] or type(error).__name__
