"""Names and sizes of backbones. timm, and with it torch, is imported only to judge names that are not well known."""

import re
from typing import NamedTuple

from utils.registry import nearest


class ViTSize(NamedTuple):
    """Sizes in which teacher and student may have to agree: blocks L, image size in pixels, tokens N."""

    depth: int
    image_size: int
    num_tokens: int


# The backbones whose weights come with the project.
OWN_MODELS = {"mini_vit_base": ViTSize(6, 64, 17), "mini_vit_small": ViTSize(4, 64, 17)}
# The paper's backbones; without a tag their names mean these weights, whatever timm's present default is.
PAPER_MODELS = tuple(f"vit_{size}_patch16_224" for size in ("tiny", "small", "base", "large"))
PAPER_TAG = "augreg_in21k_ft_in1k"

_DEPTHS = {"tiny": 12, "small": 12, "base": 12, "large": 24}
_MODULES = ("vision_transformer", "vision_transformer_hybrid", "deit", "eva")  # of timm


def known_size(name: str) -> ViTSize | None:
    """The sizes that a backbone's name tells, or None: then they are checked once it is built."""
    if name in OWN_MODELS:
        return OWN_MODELS[name]
    match = re.fullmatch(r"vit_(tiny|small|base|large)_patch([1-9]\d*)_(\d+)(\.\w+)?", name)
    if match is None:
        return None
    patch, image = int(match[2]), int(match[3])
    return ViTSize(_DEPTHS[match[1]], image, 1 + (image // patch) ** 2)


def name_problem(name: str) -> str | None:
    """Say in one sentence what is wrong with a backbone's name, or return None."""
    if name in OWN_MODELS or name.removesuffix(f".{PAPER_TAG}") in PAPER_MODELS:
        return None
    if ":" in name:
        return f"{name!r} is an address; give timm's name of the architecture, and the weights as a file"
    import timm

    architecture, dot, tag = name.partition(".")
    # Former names (vit_base_patch16_224_in21k), which timm maps to present ones, have no configuration.
    former = timm.is_model(architecture) and timm.get_pretrained_cfg(architecture) is None
    usable = [model for module in _MODULES for model in timm.list_models(module=module)]
    if architecture not in usable and not former:
        guess = nearest(name, [*OWN_MODELS, *usable])
        hint = f"; did you mean {guess}?" if guess else ""
        return f"{name!r} is neither a vision transformer of timm nor one of {', '.join(OWN_MODELS)}{hint}"
    tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{architecture}.*")]
    if not dot or tag in tags:
        return None
    guess = nearest(tag, tags)
    hint = f"; did you mean {architecture}.{guess}?" if guess else ""
    return f"timm has no weights {tag!r} for {architecture}{hint} (it has: {', '.join(tags) or 'none'})"
