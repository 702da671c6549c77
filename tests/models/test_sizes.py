"""The sizes and names that are told without timm are timm's."""

import pytest
import timm
import torch

from models.sizes import OWN_MODELS, ViTSize, known_size, name_problem

KNOWN = [name for name in timm.list_models("vit_*") if known_size(name)]


def test_the_papers_models_are_known():
    assert known_size("vit_base_patch16_224") == ViTSize(768, 12, 12, 224, 16, 197)
    assert known_size("vit_small_patch16_224.augreg_in21k_ft_in1k") == ViTSize(384, 12, 6, 224, 16, 197)
    assert known_size("vit_large_patch16_224").depth == 24


@pytest.mark.parametrize("name", KNOWN)
def test_known_sizes_are_timms(name):
    size = known_size(name)
    with torch.device("meta"):
        vit = timm.create_model(name, num_classes=0)
    assert (vit.embed_dim, len(vit.blocks), vit.blocks[0].attn.num_heads) == size[:3]
    assert vit.patch_embed.img_size == (size.image_size,) * 2
    assert vit.patch_embed.patch_size == (size.patch_size,) * 2
    assert vit.pos_embed.shape[1] == size.num_tokens


@pytest.mark.parametrize("name", KNOWN)
def test_no_weights_of_a_known_model_have_another_input_size(name):
    for tag in [None, *(full for full in timm.list_pretrained(f"{name}.*"))]:
        cfg = timm.get_pretrained_cfg(tag or name)
        assert cfg.input_size[1:] == (known_size(name).image_size,) * 2


@pytest.mark.parametrize("name", ["resnet50", "vit_base_patch16_clip_224", "vit_base_patch0_224", "", "vit"])
def test_other_names_tell_nothing(name):
    assert known_size(name) is None


def test_names_of_timms_vision_transformers_and_our_own_are_right():
    names = [*OWN_MODELS, *timm.list_models("vit_*_patch*"), *timm.list_models("deit3_*"), "test_vit"]
    others = ("relpos", "srelpos", "rope", "_mci")
    ours = [name for name in names if not any(word in name for word in others)]
    assert len(ours) > 100
    assert {name: name_problem(name) for name in ours if name_problem(name)} == {}


def test_weights_with_a_tag_are_right():
    tagged = [name for name in timm.list_pretrained("vit_base_patch*_224*") if "rope" not in name]
    assert {name: name_problem(name) for name in tagged if name_problem(name)} == {}


@pytest.mark.parametrize(
    ("name", "guess"),
    [
        ("vit_bas_patch16_224", "vit_base_patch16_224"),
        ("mini_vit_bse", "mini_vit_base"),
        ("vit_base_patch16_224.augreg_in21k_ft_in1", "vit_base_patch16_224.augreg_in21k_ft_in1k"),
    ],
)
def test_wrong_names_are_refused_with_the_nearest(name, guess):
    assert f"did you mean {guess}?" in name_problem(name)


@pytest.mark.parametrize("name", ["resnet50", "swin_base_patch4_window7_224", "vit_tiny_patch8_224", ""])
def test_what_is_no_vision_transformer_of_timm_is_refused(name):
    assert name_problem(name)
