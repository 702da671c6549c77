"""A frozen timm Vision Transformer whose attention also reads prompts (prefix tuning, arXiv 2101.00190).

Shapes here and in the modules above: B batch, N = 1 + registers + patches, T extra tokens, D width,
L blocks, P prompt length per key or value.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn


class UnsupportedBackboneError(ValueError):
    """A network that is no plain ViT with a class token; the message says what is missing."""


class KV(NamedTuple):
    """Prompt keys and values, [B, P, D] each, or [1, P, D] when every image has the same."""

    key: Tensor
    value: Tensor


class LayerPrompt(NamedTuple):
    """Keys and values that one block's attention reads besides the tokens: ``keys = [prefix; K(tokens); suffix]``."""

    prefix: KV | None = None
    suffix: KV | None = None


class ViTOutput(NamedTuple):
    """Result of a forward pass.

    Attributes:
        cls: final-norm class token, [B, D].
        extra: final-norm extra tokens, [B, T, D] (T may be 0).
        blocks: output of every block before the final norm, L x [B, N + T, D]; () unless asked for.
    """

    cls: Tensor
    extra: Tensor
    blocks: tuple[Tensor, ...]


def split_prompt(prompt: Tensor) -> KV:
    """Split prompts [..., P, D] in two halves: the first P/2 are keys, the rest values."""
    half = prompt.shape[-2] // 2
    return KV(prompt[..., :half, :], prompt[..., half:, :])


class PromptedViT(nn.Module):
    """Wrap a timm ``VisionTransformer`` so that prompts and extra tokens can be injected.

    All its weights are frozen and it always runs in evaluation mode: gradients pass through it to the
    prompts, none reach its weights, so no linear layer keeps its input for the backward pass.

    Args:
        vit: timm model with a class token and plain pre-norm blocks.

    Raises:
        UnsupportedBackboneError: the model has no class token or other blocks than timm's ``Block``.
    """

    def __init__(self, vit: VisionTransformer) -> None:
        super().__init__()
        check_supported(vit)
        self.vit = vit.eval().requires_grad_(False)
        self.autocast_dtype: torch.dtype | None = None
        # timm moves the last norm behind the pooling for average-pooled models.
        self.final_norm = vit.norm if not isinstance(vit.norm, nn.Identity) else vit.fc_norm

    @property
    def embed_dim(self) -> int:
        return self.vit.embed_dim

    @property
    def depth(self) -> int:
        return len(self.vit.blocks)

    @property
    def num_heads(self) -> int:
        return self.vit.blocks[0].attn.num_heads

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

        The weights of linear and convolution layers are cast once: autocast would do so at every forward pass,
        since it keeps the casts of weights with gradients only.
        """
        for module in self.vit.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.to(dtype)
        self.autocast_dtype = dtype
        return self

    def train(self, mode: bool = True) -> PromptedViT:
        """Stay in evaluation mode: the backbone is frozen (no dropout, no drop-path)."""
        return super().train(False)

    def embed(self, images: Tensor) -> Tensor:
        """Turn images [B, 3, H, W] in [0, 1] into the tokens [B, N, D] that enter block 0."""
        with self._arithmetic(images.device):
            # timm has no public name for adding class token, registers and positions.
            tokens = self.vit._pos_embed(self.vit.patch_embed(images))
            return self.vit.norm_pre(tokens)

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
            tokens: result of :meth:`embed`, [B, N, D].
            prompts: one entry per block, or None for none.
            extra_tokens: [T, D], appended to every image's tokens without position embedding.
            return_blocks: also return every block's output. Without it, the last block computes queries,
                projection and MLP of the class and extra tokens only, since nothing else is read.
        """
        with self._arithmetic(tokens.device):
            return self._run_blocks(tokens, prompts, extra_tokens, return_blocks)

    def _arithmetic(self, device: torch.device) -> contextlib.AbstractContextManager:
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(device.type, dtype=self.autocast_dtype)

    def _run_blocks(
        self,
        tokens: Tensor,
        prompts: Sequence[LayerPrompt] | None,
        extra_tokens: Tensor | None,
        return_blocks: bool,
    ) -> ViTOutput:
        batch, num_tokens, _ = tokens.shape
        if extra_tokens is not None:
            extra = extra_tokens.to(tokens.dtype).expand(batch, -1, -1)
            tokens = torch.cat([tokens, extra], dim=1)
        blocks: list[Tensor] = []
        last = self.depth - 1
        for index, block in enumerate(self.vit.blocks):
            prompt = prompts[index] if prompts is not None else LayerPrompt()
            read = num_tokens if index == last and not return_blocks else None
            tokens = _run_block(block, tokens, prompt, num_tokens=read)
            if return_blocks:
                blocks.append(tokens)
        if return_blocks:
            tokens = _cls_and_extra(tokens, num_tokens)
        normed = self.final_norm(tokens)  # [B, 1 + T, D]
        if self.autocast_dtype is not None:
            normed = normed.float()
        return ViTOutput(normed[:, 0], normed[:, 1:], tuple(blocks))


def check_supported(vit: nn.Module) -> None:
    """Raise :class:`UnsupportedBackboneError` with the reason when prompts cannot be injected into ``vit``."""
    if not isinstance(vit, VisionTransformer):
        raise UnsupportedBackboneError(
            f"{type(vit).__name__} is not a timm VisionTransformer; choose a vit_* or deit* model"
        )
    if vit.cls_token is None:
        raise UnsupportedBackboneError("it has no class token, which is what the head reads; choose another ViT")
    for block in vit.blocks:
        attn = getattr(block, "attn", None)
        if type(block) is not Block or type(attn) is not Attention or attn.gate is not None:
            raise UnsupportedBackboneError(
                f"it is built of {type(block).__name__} with {type(attn).__name__}, but only plain pre-norm blocks"
                " with standard attention can read prompts; choose another ViT"
            )


def _cls_and_extra(tokens: Tensor, num_tokens: int) -> Tensor:
    """The rows that are read at the end: class token and extra tokens, [B, 1 + T, D]."""
    if tokens.shape[1] == num_tokens:
        return tokens[:, :1]
    return torch.cat([tokens[:, :1], tokens[:, num_tokens:]], dim=1)


def _run_block(block: Block, tokens: Tensor, prompt: LayerPrompt, num_tokens: int | None) -> Tensor:
    """One pre-norm block; with ``num_tokens`` = N only the class and extra rows come out, [B, 1 + T, D]."""
    normed = block.norm1(tokens)
    if num_tokens is None:
        query_tokens = None
    else:
        query_tokens = _cls_and_extra(normed, num_tokens)
        tokens = _cls_and_extra(tokens, num_tokens)
    tokens = tokens + block.ls1(_attend(block.attn, normed, prompt, query_tokens))
    return tokens + block.ls2(block.mlp(block.norm2(tokens)))


def _attend(attn: Attention, tokens: Tensor, prompt: LayerPrompt, query_tokens: Tensor | None) -> Tensor:
    """Attention of ``query_tokens`` [B, Q, D] (default: all tokens) over prompts and tokens [B, N, D]."""
    prompted = prompt.prefix is not None or prompt.suffix is not None
    if prompted and query_tokens is None:
        query_tokens = tokens  # projected apart, since keys and values die when they are joined with the prompts
    query, key, value = _project(attn, tokens, query_tokens)  # [B, *, heads, head_dim]
    query, key = attn.q_norm(query), attn.k_norm(key)
    parts = [prompt.prefix, KV(key, value), prompt.suffix]
    if prompted:
        key = torch.cat([_heads(part.key, key) for part in parts if part is not None], dim=1)
        value = torch.cat([_heads(part.value, value) for part in parts if part is not None], dim=1)
    mixed = F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
    return attn.proj(attn.norm(mixed.transpose(1, 2).flatten(2)))


def _project(attn: Attention, tokens: Tensor, query_tokens: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, [B, *, heads, head_dim] each."""
    heads = (attn.num_heads, attn.head_dim)
    if query_tokens is None:
        return attn.qkv(tokens).unflatten(-1, (3, *heads)).unbind(2)
    width = attn.attn_dim
    weight, bias = attn.qkv.weight, attn.qkv.bias
    bias_q, bias_kv = (None, None) if bias is None else (bias[:width], bias[width:])
    query = F.linear(query_tokens, weight[:width], bias_q).unflatten(-1, heads)
    key, value = F.linear(tokens, weight[width:], bias_kv).unflatten(-1, (2, *heads)).unbind(2)
    return query, key, value


def _heads(part: Tensor, like: Tensor) -> Tensor:
    """Bring prompt keys or values [B or 1, P, D] to ``like``'s layout [B, P, heads, head_dim]."""
    if part.dim() == 3:
        part = part.unflatten(-1, like.shape[2:])
    return part.to(like.dtype).expand(like.shape[0], -1, -1, -1)
