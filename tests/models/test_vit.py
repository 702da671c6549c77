"""PromptedViT computes the same as timm, and attention with prompts by the formula."""

import math

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer

from models import mini_vit
from models.vit import KV, LayerPrompt, PromptedViT, split_prompt
from utils.config import ConfigError

SMALL = {"embed_dim": 48, "num_heads": 3, "depth": 2}
MODELS = {
    "vit_tiny_patch16_224": {"img_size": 64},
    "vit_small_patch14_reg4_dinov2": {"img_size": 56},
    "vit_base_patch16_clip_quickgelu_224": {"img_size": 64},
    "deit3_small_patch16_224": {"img_size": 64},
    "deit_tiny_distilled_patch16_224": {"img_size": 64},
    "vit_base_r26_s32_224": {"img_size": 64},
    "vit_small_patch16_dinov3": {"img_size": 64, "init_values": 0.5},
    "eva02_tiny_patch14_224": {"img_size": 56},
    "eva02_base_patch14_224": {"img_size": 56},
    "vit_tiny_patch16_224 with q/k-norm": {"img_size": 64, "qk_norm": True},
    "vit_tiny_patch16_224 with dynamic size": {"img_size": 64, "dynamic_img_size": True},
    "vit_tiny_patch16_224 without final norm": {"img_size": 64, "final_norm": False},
    "vit_tiny_patch16_224 averaged": {"img_size": 64, "global_pool": "avg"},
}


def timm_model(name: str) -> VisionTransformer:
    """A small model of the family, with weights that leave no part without effect."""
    torch.manual_seed(0)
    if name.startswith("mini_vit"):
        vit = getattr(mini_vit, name)()
    else:
        vit = timm.create_model(name.partition(" ")[0], num_classes=0, **SMALL, **MODELS[name])
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return vit.eval().double()


def backbone(name: str = "vit_tiny_patch16_224") -> PromptedViT:
    return PromptedViT(timm_model(name))


def images(vit: PromptedViT) -> torch.Tensor:
    return torch.rand(2, 3, vit.image_size, vit.image_size, dtype=torch.float64)


def random_prompts(vit: PromptedViT) -> list[LayerPrompt]:
    """Prefixes of three keys for each of two images, suffixes of two for all, and what the class token gets."""
    draw = [torch.rand(vit.depth, *shape, vit.embed_dim).double() for shape in ((2, 6), (1, 4), (1, 2))]
    return [LayerPrompt(*map(split_prompt, layer)) for layer in zip(*draw, strict=True)]


@pytest.mark.parametrize("name", [*MODELS, "mini_vit_base", "mini_vit_small"])
def test_without_prompts_it_computes_the_same_as_timm(name):
    vit = backbone(name)
    batch = images(vit)
    with torch.no_grad():
        expected = vit.vit.forward_features(batch)
        if vit.final_norm is vit.vit.fc_norm:
            expected = vit.vit.fc_norm(expected)  # timm applies it after the pooling
        output = vit(vit.embed(batch), return_blocks=True)
        assert output.blocks[-1].shape == (2, vit.num_tokens, vit.embed_dim)
        tokens = vit.final_norm(output.blocks[-1])
        shortcut = vit(vit.embed(batch))
    assert len(output.blocks) == vit.depth and shortcut.blocks == ()
    for one, other in ((tokens, expected), (output.cls, expected[:, 0]), (shortcut.cls, expected[:, 0])):
        assert (one - other).abs().max() < 1e-10
    assert output.extra.shape == shortcut.extra.shape == (2, 0, vit.embed_dim)
    vit.train()
    assert not any(module.training for module in vit.modules())
    assert not any(parameter.requires_grad for parameter in vit.parameters())


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3", "eva02_base_patch14_224", "mini_vit_small"]
)
def test_trimming_the_last_block_changes_neither_outputs_nor_gradients(name):
    vit = backbone(name)
    tokens = vit.embed(images(vit))
    prompts = random_prompts(vit)
    extra = torch.rand(2, vit.embed_dim, dtype=torch.float64)
    leaves = [part for layer in prompts for kv in layer for part in kv] + [extra]
    results = []
    for return_blocks in (False, True):
        for leaf in leaves:
            leaf.requires_grad_().grad = None
        output = vit(tokens, prompts, extra, return_blocks=return_blocks)
        (output.cls.square().sum() + output.extra.square().sum()).backward()
        results.append([output.cls, output.extra, *(leaf.grad for leaf in leaves)])
    assert results[0][1].shape == (2, 2, vit.embed_dim)
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_attention_with_prompts_by_the_formula():
    """``keys = [P_k; K(tokens); KD_k]``, values likewise; the class token's get an addend; queries from the tokens."""
    vit = backbone()
    tokens = vit.embed(images(vit))
    prompts = random_prompts(vit)
    extra = torch.rand(1, vit.embed_dim, dtype=torch.float64)
    output = vit(tokens, prompts, extra, return_blocks=True)

    block, (prefix, suffix, cls_add) = vit.vit.blocks[0], prompts[0]
    x = torch.cat([tokens, extra.expand(2, 1, -1)], dim=1)
    query, key, value = block.attn.qkv(block.norm1(x)).clone().chunk(3, dim=2)
    key[:, 0] += cls_add.key[0, 0]
    value[:, 0] += cls_add.value[0, 0]
    key = torch.cat([prefix.key, key, suffix.key.expand(2, -1, -1)], dim=1)
    value = torch.cat([prefix.value, value, suffix.value.expand(2, -1, -1)], dim=1)
    heads = []
    for head in range(SMALL["num_heads"]):
        part = slice(head * 16, (head + 1) * 16)
        weights = (query[..., part] @ key[..., part].mT / math.sqrt(16)).softmax(dim=2)
        heads.append(weights @ value[..., part])
    x = x + block.attn.proj(torch.cat(heads, dim=2))
    x = x + block.mlp(block.norm2(x))
    torch.testing.assert_close(output.blocks[0], x, rtol=1e-10, atol=1e-10)


def test_no_linear_layer_keeps_its_input_for_the_backward_pass():
    vit = backbone()
    tokens = vit.embed(images(vit))
    key = torch.rand(1, 1, vit.embed_dim, dtype=torch.float64, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        vit(tokens, [LayerPrompt(prefix=KV(key, key)), LayerPrompt()])
    wide = [x for x in saved if x.shape[-1:] == (4 * vit.embed_dim,) and x.dim() == 3]
    assert len(wide) == vit.depth  # GELU's inputs; the second linear layer of the MLP keeps nothing


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "mini_vit_small", "eva02_tiny_patch14_224"])
def test_reduced_precision_is_that_of_autocast(name):
    vit = backbone(name).float()
    batch = images(vit).float()
    prompts = [LayerPrompt(*(KV(kv.key.float(), kv.value.float()) for kv in layer)) for layer in random_prompts(vit)]
    outputs = []
    for _ in range(2):
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            outputs.append(vit(vit.embed(batch), prompts).cls)
        vit.reduce_precision(torch.bfloat16)
    assert torch.equal(*outputs)
    assert vit.vit.blocks[0].attn.qkv.weight.dtype == torch.bfloat16
    assert vit.vit.blocks[0].norm1.weight.dtype == vit.vit.pos_embed.dtype == torch.float32


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: timm.create_model("resnet18"), "not a timm VisionTransformer"),
        (lambda: timm.create_model("test_vit3"), "no class token"),
        (lambda: timm.create_model("vit_base_patch16_xp_224", **SMALL), "only plain pre-norm blocks"),
        (lambda: timm.create_model("vit_tiny_patch16_224", img_size=(32, 48), **SMALL), "32 x 48 pixels"),
    ],
)
def test_unsupported_networks(build, words):
    with pytest.raises(ConfigError, match=words):
        PromptedViT(build())
