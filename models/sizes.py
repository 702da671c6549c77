"""Names and sizes of the backbones. Importing this module loads neither torch nor timm."""

from __future__ import annotations

import re
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

PAPER_NAMES = tuple(f"vit_{size}_patch16_224" for size in ("tiny", "small", "base", "large"))
_FAMILIES = {"tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16)}
_NAME = re.compile(r"vit_(tiny|small|base|large)_patch([1-9]\d*)_(\d+)(?:\.\w+)?")
# timm's modules whose models are VisionTransformers; the blocks of other transformers cannot read prompts.
_MODULES = ("vision_transformer", "deit", "vision_transformer_hybrid", "vitamin")


def known_size(name: str) -> ViTSize | None:
    """The sizes of a backbone as its name tells them; None for other names, whose sizes show when they are built."""
    if name in OWN_MODELS:
        return OWN_MODELS[name]
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    patch, image = int(match[2]), int(match[3])
    return ViTSize(*_FAMILIES[match[1]], image, patch, 1 + (image // patch) ** 2)


def name_problem(name: str) -> str | None:
    """The reason why a name is no backbone's, with the way out, or None.

    Any name but the project's own and the paper's takes as long as loading timm, which knows the others.
    """
    if name in OWN_MODELS or name in PAPER_NAMES:
        return None
    import timm

    def is_vit(architecture: str) -> bool:
        return timm.model_entrypoint(architecture).__module__.endswith(_MODULES)

    architecture, _, tag = name.partition(".")
    if not (timm.is_model(architecture) and is_vit(architecture)):
        guess = nearest(name, [*OWN_MODELS, *filter(is_vit, timm.list_models())])
        hint = f"; did you mean {guess}?" if guess else ""
        return f"{name!r} is no vision transformer of timm and none of {', '.join(OWN_MODELS)}{hint}"
    tags = [each.partition(".")[2] for each in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        guess = nearest(tag, tags)
        hint = f"; did you mean {architecture}.{guess}?" if guess else ""
        return f"timm has no weights {tag!r} for {architecture}{hint} (it has: {', '.join(tags)})"
    return None
