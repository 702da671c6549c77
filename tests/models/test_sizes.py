"""Sizes and names that are known without timm are those of timm."""

import pytest
import timm
import torch

from models.sizes import OWN_MODELS, PAPER_MODELS, PAPER_TAG, known_size, name_problem

KNOWN = [name for name in timm.list_models("vit_*") if known_size(name)]


@pytest.mark.parametrize("name", KNOWN)
def test_known_sizes(name):
    size = known_size(name)
    with torch.device("meta"):
        vit = timm.create_model(name, num_classes=0)
    assert len(vit.blocks) == size.depth
    assert vit.patch_embed.img_size == (size.image_size,) * 2
    assert vit.pos_embed.shape[1] == size.num_tokens
    for full in timm.list_pretrained(f"{name}.*"):  # no tag changes the input size
        assert known_size(full) == size and timm.get_pretrained_cfg(full).input_size[1:] == (size.image_size,) * 2


def test_right_names():
    assert not known_size("vit_base_patch16_clip_224") and not known_size("vit")
    models = timm.list_models(["vit_*_224", "deit3_*"], exclude_filters=["*rope*", "*relpos*", "*_mci*", "*_pe_*"])
    tagged = timm.list_pretrained("vit_base_patch16_224.*")
    assert len(models) > 40 and len(tagged) > 8
    tagged += [f"{name}.{PAPER_TAG}" for name in PAPER_MODELS]
    assert set(tagged) <= set(timm.list_pretrained())
    names = [*OWN_MODELS, *models, *tagged, "vit_base_patch14_dinov2", "vit_base_patch16_224_in21k"]
    assert {name: problem for name in names if (problem := name_problem(name))} == {}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("vit_base_patch16_224.augreg_in22k", "did you mean vit_base_patch16_224.augreg_in21k? (it has: augreg2_in21k"),
        ("vit_base_patch16_224.", "no weights ''"),
        ("hf-hub:timm/vit_base_patch16_224.dino", "is an address"),
        ("swin_tiny_patch4_window7_224", "neither a vision transformer"),
    ],
)
def test_wrong_names(name, words):
    assert words in name_problem(name)
