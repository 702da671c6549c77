"""A frozen timm Vision Transformer whose attention also reads prompts (prefix tuning).

Shapes here and in the modules above: B batch, N = 1 + registers + patches, T extra tokens, D width,
L blocks, P prompt length per key or value.
"""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import Attention, apply_rot_embed_cat
from timm.models.eva import Eva, EvaAttention, EvaBlock
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from utils.config import ConfigError


class KV(NamedTuple):
    """Prompt keys and values, [B, P, D] each, or [1, P, D] when every image has the same."""

    key: Tensor
    value: Tensor


class LayerPrompt(NamedTuple):
    """Prompts of one block's attention: ``keys = [prefix; K(tokens); suffix]``, and values likewise.

    ``cls_add`` (P = 1) is added to the class token's own key and value.
    """

    prefix: KV | None = None
    suffix: KV | None = None
    cls_add: KV | None = None


class ViTOutput(NamedTuple):
    """Result of a forward pass."""

    cls: Tensor  # final-norm class token, [B, D]
    extra: Tensor  # final-norm extra tokens, [B, T, D] (T may be 0)
    blocks: tuple[Tensor, ...]  # output of every block before the final norm, L x [B, N + T, D]; () unless asked for


def split_prompt(prompt: Tensor) -> KV:
    """Split prompts [..., P, D] in two halves: the first P/2 are keys, the rest values."""
    half = prompt.shape[-2] // 2
    return KV(prompt[..., :half, :], prompt[..., half:, :])


class PromptedViT(nn.Module):
    """Wrap a timm ``VisionTransformer`` or ``Eva`` so that prompts and extra tokens can be injected.

    The weights are frozen and the model always runs in evaluation mode. Gradients pass through it to the
    prompts but never reach its weights, so no linear layer keeps its input for the backward pass.
    Raises ConfigError for a ``vit`` that :func:`check_supported` refuses.
    """

    def __init__(self, vit: VisionTransformer | Eva) -> None:
        super().__init__()
        check_supported(vit)
        self.vit = vit.eval().requires_grad_(False)
        self.autocast_dtype: torch.dtype | None = None
        self.register_buffer("mean_std", None, persistent=False)
        self.run_block = run_block  # or the same, compiled
        # timm moves the last norm behind the pooling for average-pooled models.
        self.final_norm = vit.norm if not isinstance(vit.norm, nn.Identity) else vit.fc_norm

    @property
    def embed_dim(self) -> int:
        return self.vit.embed_dim

    @property
    def depth(self) -> int:
        return len(self.vit.blocks)

    @property
    def image_size(self) -> int:
        """Height and width of the images it expects, in pixels."""
        return self.vit.patch_embed.img_size[0]

    @property
    def num_tokens(self) -> int:
        """N: class token, registers and patches."""
        return self.vit.patch_embed.num_patches + self.vit.num_prefix_tokens

    def reduce_precision(self, dtype: torch.dtype) -> PromptedViT:
        """Compute in ``dtype`` (bfloat16 or float16) where autocast does so, in place; outputs stay float32.

        The weights are cast once. Autocast would do so in every forward pass, as it caches only weights with gradients.
        """
        for module in self.vit.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.to(dtype)
        self.autocast_dtype = dtype
        return self

    def normalize(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Subtract ``mean`` from the colours of all images and divide them by ``std`` (3 numbers each), in place."""
        self.mean_std = torch.tensor([mean, std])[..., None, None]  # [2, 3, 1, 1]

    def train(self, mode: bool = True) -> PromptedViT:
        """Stay in evaluation mode: the backbone is frozen (no dropout, no drop-path)."""
        return super().train(False)

    def embed(self, images: Tensor) -> Tensor:
        """Turn images [B, 3, H, W] in [0, 1] into the tokens [B, N, D] that enter block 0."""
        if self.mean_std is not None:
            images = (images - self.mean_std[0]) / self.mean_std[1]
        with self._arithmetic(images.device):
            # timm has no public function for the tokens before block 0.
            tokens = self.vit._pos_embed(self.vit.patch_embed(images))
            return self.vit.norm_pre(tokens[0] if isinstance(tokens, tuple) else tokens)  # Eva adds the rotations

    def forward(
        self,
        tokens: Tensor,
        prompts: Sequence[LayerPrompt] | None = None,
        extra_tokens: Tensor | None = None,
        *,
        return_blocks: bool = False,
    ) -> ViTOutput:
        """Run the blocks.

        Args:
            tokens: what :meth:`embed` returned, [B, N, D].
            prompts: one entry per block, or None for none.
            extra_tokens: [T, D], appended to every image's tokens without position embedding.
            return_blocks: also return every block's output. Without it, the last block computes queries,
                projection and MLP for the class and extra tokens only, since nothing else is read.
        """
        batch, num_tokens, _ = tokens.shape
        rope = self.vit.rope.get_embed(self.vit.patch_embed.grid_size) if getattr(self.vit, "rope", None) else None
        blocks: list[Tensor] = []
        with self._arithmetic(tokens.device):
            if extra_tokens is not None:
                tokens = torch.cat([tokens, extra_tokens.to(tokens.dtype).expand(batch, -1, -1)], dim=1)
            for index, block in enumerate(self.vit.blocks):
                prompt = prompts[index] if prompts is not None else LayerPrompt()
                trimmed = index == self.depth - 1 and not return_blocks
                tokens = self.run_block(block, tokens, prompt, num_tokens if trimmed else None, rope)
                if return_blocks:
                    blocks.append(tokens)
            if return_blocks:
                tokens = _cls_and_extra(tokens, num_tokens)
            normed = self.final_norm(tokens)  # [B, 1 + T, D]
        if self.autocast_dtype is not None:
            normed = normed.float()
        return ViTOutput(normed[:, 0], normed[:, 1:], tuple(blocks))

    def _arithmetic(self, device: torch.device) -> contextlib.AbstractContextManager:
        """Autocast in the backbone's reduced precision, if it has one."""
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(device.type, dtype=self.autocast_dtype)


def check_supported(vit: nn.Module) -> None:
    """Raise ConfigError unless ``vit`` is timm's, with a class token, plain blocks and square images."""
    if not isinstance(vit, VisionTransformer | Eva):
        kind = type(vit).__name__
        raise ConfigError(f"{kind} is not a timm VisionTransformer or Eva; choose a vit_* or deit* model")
    if vit.cls_token is None:
        raise ConfigError("it has no class token, which is what the head reads; choose another ViT")
    for block in vit.blocks:
        attn = getattr(block, "attn", None)
        if (type(block), type(attn)) not in ((Block, Attention), (EvaBlock, EvaAttention)) or attn.gate is not None:
            raise ConfigError(
                f"it is built of {type(block).__name__} with {type(attn).__name__}, but only plain pre-norm blocks"
                " with standard attention can read prompts; choose another ViT"
            )
    height, width = vit.patch_embed.img_size
    if height != width:
        raise ConfigError(f"it takes images of {height} x {width} pixels; choose one with square ones")


def _cls_and_extra(tokens: Tensor, num_tokens: int) -> Tensor:
    """Class token and extra tokens [B, 1 + T, D] of [B, N + T, D], the only ones that are read at the end."""
    if tokens.shape[1] == num_tokens:
        return tokens[:, :1]
    return torch.cat([tokens[:, :1], tokens[:, num_tokens:]], dim=1)


def run_block(
    block: nn.Module, tokens: Tensor, prompt: LayerPrompt, num_tokens: int | None, rope: Tensor | None
) -> Tensor:
    """Run one pre-norm block; given ``num_tokens`` = N, for the class and extra tokens only, [B, 1 + T, D]."""
    normed = block.norm1(tokens)
    query_tokens = None
    if num_tokens is not None:
        query_tokens, tokens = _cls_and_extra(normed, num_tokens), _cls_and_extra(tokens, num_tokens)
    if isinstance(block, Block):
        scale_attention, scale_mlp = block.ls1, block.ls2
    else:
        factors = [1.0 if gamma is None else gamma for gamma in (block.gamma_1, block.gamma_2)]
        scale_attention, scale_mlp = (functools.partial(operator.mul, factor) for factor in factors)
    tokens = tokens + scale_attention(_attend(block.attn, normed, prompt, query_tokens, rope))
    return tokens + scale_mlp(block.mlp(block.norm2(tokens)))


def _attend(
    attn: nn.Module, tokens: Tensor, prompt: LayerPrompt, query_tokens: Tensor | None, rope: Tensor | None
) -> Tensor:
    """Attention of ``query_tokens`` [B, Q, D] (default: all tokens) over prompts and tokens [B, N, D].

    ``rope`` [patches, 2 head_dim], if any, turns queries and keys of patches, not those of other tokens and prompts.
    """
    prompted = any(part is not None for part in prompt)
    if prompted and query_tokens is None:
        # Projected separately, so that keys and values can be freed once they are joined with the prompts. Under
        # autocast the tokens are float32 here: they are cast once, not for each projection.
        query_tokens = tokens = tokens.to(attn.proj.weight.dtype)
    query, key, value = _project(attn, tokens, query_tokens)  # [B, *, heads, head_dim]
    query, key = attn.q_norm(query), attn.k_norm(key)
    if rope is not None:
        query = _turn(attn, query, rope) if query.shape == key.shape else query  # else it has no patches
        key = _turn(attn, key, rope)
    if prompted:
        key = _join(key, *(part and part.key for part in prompt))
        value = _join(value, *(part and part.value for part in prompt))
    mixed = F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
    return attn.proj(attn.norm(mixed.transpose(1, 2).flatten(2)))


def _turn(attn: EvaAttention, rows: Tensor, rope: Tensor) -> Tensor:
    """Turn the patches' rows of queries or keys [B, N + T, heads, head_dim] by their positions."""
    first, last = attn.num_prefix_tokens, attn.num_prefix_tokens + len(rope)
    patches = apply_rot_embed_cat(rows[:, first:last].transpose(1, 2), rope, half=attn.rotate_half).transpose(1, 2)
    return torch.cat([rows[:, :first], patches.to(rows.dtype), rows[:, last:]], dim=1)


def _weights(attn: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weights [3 D, D] and biases [3 D] of queries, keys and values; EVA's keys have no bias."""
    if isinstance(attn, Attention):
        return attn.qkv.weight, attn.qkv.bias
    if attn.qkv is not None:
        weight, bias_q, bias_v = attn.qkv.weight, attn.q_bias, attn.v_bias
    else:
        weight = torch.cat([attn.q_proj.weight, attn.k_proj.weight, attn.v_proj.weight])
        bias_q, bias_v = attn.q_proj.bias, attn.v_proj.bias
    return weight, None if bias_q is None else torch.cat([bias_q, torch.zeros_like(bias_q), bias_v])


def _project(attn: nn.Module, tokens: Tensor, query_tokens: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, [B, *, heads, head_dim] each."""
    heads, width = (attn.num_heads, attn.head_dim), attn.num_heads * attn.head_dim
    weight, bias = _weights(attn)
    if query_tokens is None:
        return F.linear(tokens, weight, bias).unflatten(-1, (3, *heads)).unbind(2)
    bias_q, bias_kv = (None, None) if bias is None else (bias[:width], bias[width:])
    query = F.linear(query_tokens, weight[:width], bias_q).unflatten(-1, heads)
    key, value = F.linear(tokens, weight[width:], bias_kv).unflatten(-1, (2, *heads)).unbind(2)
    return query, key, value


def _join(own: Tensor, prefix: Tensor | None, suffix: Tensor | None, cls_add: Tensor | None) -> Tensor:
    """The tokens' keys or values [B, N, heads, head_dim] with a block's prompts, [B or 1, P, D] each."""

    def heads(part: Tensor) -> Tensor:
        return part.unflatten(-1, own.shape[2:]).to(own.dtype).expand(own.shape[0], -1, -1, -1)

    rows = [own] if cls_add is None else [own[:, :1] + heads(cls_add), own[:, 1:]]
    prompts = [[] if part is None else [heads(part)] for part in (prefix, suffix)]
    return torch.cat([*prompts[0], *rows, *prompts[1]], dim=1)
