"""Frozen backbones by name: the project's own and timm's vision transformers, with weights from the hub or a file."""

import contextlib
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import timm
import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from timm.models import load_state_dict
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from models import mini_vit
from models.sizes import OWN_MODELS, PAPER_MODELS, PAPER_TAG, name_problem
from models.vit import PromptedViT
from utils.checkpoint import sha256_of
from utils.config import ConfigError

_log = logging.getLogger(__name__)

_HUB_FILES = ("model.safetensors", "pytorch_model.bin")  # the second one in caches of old timm versions
# Parts of classifiers and of pre-training, which a backbone does not have.
_NOT_BACKBONE = re.compile(r"(head|head_dist|fc|pre_logits|mask_token)(\.|$)")


class Backbone(NamedTuple):
    """A frozen backbone and the origin of its weights."""

    vit: PromptedViT
    tag: str  # its full name ``architecture.tag``; the architecture alone where the user gave the weights
    sha256: str  # of the file with the weights; "" for random ones


def full_name(name: str) -> str:
    """The name with the tag of its weights: the paper's for the paper's models, else timm's default."""
    if name in PAPER_MODELS:
        return f"{name}.{PAPER_TAG}"
    config = None if name in OWN_MODELS else timm.get_pretrained_cfg(name)
    return f"{config.architecture}.{config.tag}" if config is not None and config.tag else name


def load_backbone(
    name: str, *, weights: Path | None = None, pretrained: bool = True, normalize: bool = False
) -> Backbone:
    """Build a frozen backbone; ConfigError if the name, file or kind of model cannot be used, or weights are missing.

    Args:
        name: ``mini_vit_base``, ``mini_vit_small``, or a timm ``VisionTransformer`` with or without tag.
        weights: ``.pth``, ``.safetensors`` or Google's ``.npz`` with the weights, instead of timm's own.
        pretrained: False for random weights, drawn from torch's global generator, for tests and benchmarks.
        normalize: whether pretrained weights get images as they did in their training, that is, less a mean and divided
            by a standard deviation; a file's weights are taken for those of ``name``. The project's own had neither.
    """
    if problem := name_problem(name):
        raise ConfigError(problem)
    full = full_name(name)
    # Without values ("meta") until the weights are known, so that no time is spent on random ones.
    with torch.device("meta" if pretrained else "cpu"):
        vit = getattr(mini_vit, name)() if name in OWN_MODELS else timm.create_model(full, num_classes=0)
    try:
        prompted = PromptedViT(vit)
    except ConfigError as error:
        raise ConfigError(f"{name} cannot be used: {error}") from error
    if not pretrained:
        return Backbone(prompted, full, "")
    if weights is not None or name in OWN_MODELS:
        path = weights or mini_vit.WEIGHTS_DIR / f"{name}.safetensors"
        _load_file(vit, path, name)
    else:
        path = _hub_file(full, vit.pretrained_cfg["hf_hub_id"])
        with _reading(path):
            overlay = {"file": str(path), "custom_load": False}
            vit = timm.create_model(full, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=0)
        prompted = PromptedViT(vit)
    if normalize and hasattr(vit, "pretrained_cfg"):  # the project's own have none
        prompted.normalize(vit.pretrained_cfg["mean"], vit.pretrained_cfg["std"])
    tag = full if weights is None else full.partition(".")[0]
    _log.debug("weights of %s from %s", tag, path)
    return Backbone(prompted, tag, sha256_of(path))


def read_state(path: Path) -> dict[str, Tensor]:
    """Read the tensors in a ``.pth`` or ``.safetensors`` file, without running code from it; ConfigError if that fails.

    Returns:
        The state dict without wrappers (``state_dict``, ``model``), prefixes (``module.``) and other values.
    """
    with _reading(path):
        entries = load_state_dict(str(path), weights_only=True).items()
        state = {key: value for key, value in entries if isinstance(value, Tensor)}
    if not state:
        raise ConfigError(f"{path} holds no tensors; give a file with a state dict")
    return state


def misfit(state: Mapping[str, Tensor], model: Mapping[str, Tensor]) -> str | None:
    """Say how a state dict differs from that of a model in a name, shape or kind of number, or return None."""
    for key, value in model.items():
        if key not in state:
            return f"it lacks {key}"
        if state[key].shape != value.shape:
            return f"{key} has shape {tuple(state[key].shape)}, not {tuple(value.shape)}"
        if value.is_floating_point() and not state[key].is_floating_point():
            return f"{key} holds {state[key].dtype}, not real numbers"
    unknown = [key for key in state if key not in model]
    return f"the model has no {unknown[0]}" if unknown else None


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn what goes wrong while a file is read into a :class:`ConfigError`."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror or 'no such file'})") from error
    except Exception as error:  # a damaged file can raise anything
        what = "is damaged, cut short or of another kind of model, or holds Python objects besides tensors"
        way_out = "which are not loaded because that could run code; fetch it again, or save its state dict alone"
        raise ConfigError(f"{path} {what}, {way_out}") from error


def _load_file(vit: VisionTransformer, path: Path, name: str) -> None:
    """Fill a model that was built without values (raises ConfigError if the file is not of that model)."""
    vit.to_empty(device="cpu")
    for module in vit.modules():  # computed and not loaded, such as rotations by position
        if hasattr(module, "init_non_persistent_buffers"):
            module.init_non_persistent_buffers()
    if path.suffix == ".npz":
        with _reading(path):
            problem = _load_npz(vit, path)
    else:
        state = {key: value for key, value in read_state(path).items() if not _NOT_BACKBONE.match(key)}
        if (problem := misfit(state, vit.state_dict())) is None:
            vit.load_state_dict(state)
    if problem is not None:
        raise ConfigError(f"{path} does not fit {name}: {problem}; give the weights of that model")


def _load_npz(vit: VisionTransformer, path: Path) -> str | None:
    """Load Google's format; return why it does not fit, or None.

    timm's reader takes what it looks for, ignores the rest and resamples without a word, so the weights are counted.
    """
    with np.load(path, allow_pickle=False) as archive:
        sizes = {key: archive[key].size for key in archive}
    found = sum(size for key, size in sizes.items() if not re.search("^opt/(?!target/)|(^|/)(head|pre_logits)/", key))
    wanted = sum(parameter.numel() for parameter in vit.parameters())
    if found != wanted:
        return f"it holds {found:,} weights and the model has {wanted:,}, as for another size, patch or input size"
    vit.load_pretrained(str(path))
    return None


def _hub_file(full: str, repository: str | None) -> Path:
    """Find timm's weights in the cache of the Hugging Face hub, or download them."""
    if repository is None:
        raise ConfigError(f"timm has no weights for {full}; give a file (--t_weights/--s_weights FILE)")
    for file in _HUB_FILES:
        if isinstance(found := try_to_load_from_cache(repository, file), str):
            return Path(found)
    url = hf_hub_url(repository, _HUB_FILES[0])
    try:
        get_hf_file_metadata(url, timeout=5)  # fails at once without a network; hf_hub_download retries for 23 s
        return Path(hf_hub_download(repository, _HUB_FILES[0]))
    except Exception as error:  # the client passes on those of its HTTP library
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise ConfigError(
            f"the weights of {full} are not on this machine and cannot be fetched ({reason}); on a machine with a"
            f" network get {url} and pass the file by --t_weights/--s_weights FILE"
        ) from error
