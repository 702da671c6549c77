"""Sizes of the backbones and their names, without importing torch or timm.

A wrong configuration must be refused before the seconds that those imports cost. What this module does not
know is not wrong: the same checks run again on the constructed backbones.
"""

from __future__ import annotations

import functools
import importlib.util
import re
import sys
from pathlib import Path
from typing import NamedTuple

from utils.registry import nearest


class ViTSize(NamedTuple):
    """Sizes of a vision transformer: width D, blocks L, heads, input and patch size in pixels, tokens N."""

    embed_dim: int
    depth: int
    num_heads: int
    image_size: int
    patch_size: int
    num_tokens: int


OWN_MODELS: dict[str, ViTSize] = {
    "mini_vit_base": ViTSize(192, 6, 3, 64, 16, 17),
    "mini_vit_small": ViTSize(96, 4, 3, 64, 16, 17),
}
"""The project's own backbones, whose weights come with it."""

_TIMM_FAMILIES = {
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
}
_TIMM_NAME = re.compile(r"vit_(tiny|small|base|large|huge)_patch(\d+)_(\d+)(?:\.\w+)?")
# The files of timm's models package that define VisionTransformer models; other transformers (Swin, BEiT)
# have blocks of another kind, which the prompts cannot enter.
_TIMM_FILES = ("vision_transformer.py", "deit.py", "vision_transformer_hybrid.py", "vitamin.py")


def known_size(name: str) -> ViTSize | None:
    """The sizes of a backbone as its name tells them, or None for a name that does not tell.

    Known are the project's own models and ``vit_{tiny,small,base,large,huge}_patch{P}_{S}[.tag]`` of timm.
    """
    if name in OWN_MODELS:
        return OWN_MODELS[name]
    match = _TIMM_NAME.fullmatch(name)
    if match is None:
        return None
    embed_dim, depth, num_heads = _TIMM_FAMILIES[match[1]]
    patch, image = int(match[2]), int(match[3])
    if patch < 1:
        return None
    return ViTSize(embed_dim, depth, num_heads, image, patch, 1 + (image // patch) ** 2)


def name_problem(name: str) -> str | None:
    """What is wrong with a backbone's name, or None.

    timm's names are read from its source files; where these cannot be read, every name passes here and timm
    itself decides later.
    """
    if not name:
        return "the name is empty"
    if name in OWN_MODELS or ":" in name:
        return None
    timm_names = _timm_names()
    if not timm_names:
        return None
    architecture, _, tag = name.partition(".")
    if architecture not in timm_names:
        guess = nearest(name, [*OWN_MODELS, *timm_names])
        hint = f"; did you mean {guess}?" if guess else ""
        return f"{name!r} is no vision transformer of timm and none of {', '.join(OWN_MODELS)}{hint}"
    tags = timm_names[architecture]
    if tag and tags and tag not in tags:
        guess = nearest(tag, list(tags))
        hint = f"; did you mean {architecture}.{guess}?" if guess else ""
        return f"timm has no weights {tag!r} for {architecture}{hint} (it has: {', '.join(tags)})"
    return None


@functools.cache
def _timm_names() -> dict[str, tuple[str, ...]]:
    """Name -> tags of the pre-trained weights, for the VisionTransformers of the installed timm."""
    names: dict[str, set[str]] = {}
    for file in timm_model_files():
        text = file.read_text(encoding="utf-8", errors="replace")
        for name in re.findall(r"^@register_model\s*\ndef (\w+)\(", text, flags=re.M):
            names.setdefault(name, set())
        for old, new in re.findall(r"^ +'(\w+)': '(\w+)(?:\.\w+)?',", text, flags=re.M):
            if new in names:
                names.setdefault(old, set())
        for name, tag in re.findall(r"['\"](\w+)\.(\w+)['\"]: *_?cfg\(", text):
            names.setdefault(name, set()).add(tag)
    names.update((name, set()) for name in _registered_at_run_time() if name not in names)
    return {name: tuple(sorted(tags)) for name, tags in names.items()}


def timm_model_files() -> list[Path]:
    """The source files that define timm's VisionTransformer models."""
    spec = importlib.util.find_spec("timm")
    roots = list(spec.submodule_search_locations or ()) if spec else []
    files = (Path(root) / "models" / name for root in roots for name in _TIMM_FILES)
    return [file for file in files if file.is_file()]


def _registered_at_run_time() -> list[str]:
    """Models that code outside timm has registered, when timm is loaded already."""
    timm = sys.modules.get("timm")
    if timm is None:
        return []
    return timm.list_models("*vit*")
