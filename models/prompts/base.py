"""The base of all prompt pools: a query goes in, prompts for each block and a loss come out."""

from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.vit import LayerPrompt


class PromptDims(NamedTuple):
    """Sizes a pool needs: width of the query, width and depth of the backbone, number of tasks T."""

    query_dim: int
    embed_dim: int
    depth: int
    num_tasks: int


class PromptOutput(NamedTuple):
    """One :class:`LayerPrompt` per block of the backbone, and the pool's loss, a scalar, or None without one."""

    layers: Sequence[LayerPrompt]
    loss: Tensor | None = None


class PromptPool(nn.Module):
    """Base of all prompt pools.

    A pool selects by a query [B, Dq] and knows neither the backbone nor the KD method. It may use the number of
    the current task in training (``self.training``), but not in evaluation.

    Parameters are read as attributes, never through ``get_parameter`` or ``parameters()``: in a replica of
    ``DataParallel`` they are plain tensors. Buffers change in :meth:`begin_task` and :meth:`end_task` alone, as
    replicas get them when a step begins to train.

    Attributes:
        needs_query: False for prompts that do not depend on the image: no query is computed, and it is None.
        per_task: how many entries, in order, each task has of its own; 0 if tasks share them.
    """

    needs_query: ClassVar[bool] = True
    per_task: int = 0

    def __init__(self, dims: PromptDims) -> None:
        super().__init__()
        self.dims = dims
        self.task = 0

    def begin_task(self, task: int, generator: torch.Generator) -> None:
        """Prepare to learn ``task`` (from 0); parameters change in place and are never replaced."""
        self.task = task

    def end_task(self, task: int) -> None:
        """Conclude ``task``, once both models have learned it and before they are evaluated; without gradient."""

    def forward(self, query: Tensor | None) -> PromptOutput:
        """Select the prompts for a batch; ``query`` is [B, Dq] without gradient."""
        raise NotImplementedError

    def make_head(self, width: int, num_classes: int) -> nn.Module:
        """A new head: final-norm tokens [B, width] to logits [B, num_classes]; also that of a KD method's token."""
        return nn.Linear(width, num_classes)

    def usage(self, query: Tensor) -> dict[str, Tensor]:
        """Sum over a batch how much of each entry it selects, if there are any: layer name -> [M]."""
        return {}

    def blocks(self, candidates: Sequence[int]) -> list[int]:
        """Those of ``candidates`` that this backbone has; a shallow ViT lacks the later ones."""
        return [block for block in candidates if block < self.dims.depth]

    def no_prompts(self) -> list[LayerPrompt]:
        return [LayerPrompt()] * self.dims.depth


def uniform_parameter(*shape: int) -> nn.Parameter:
    """A parameter drawn uniformly from [0, 1), as all prompts of the paper start."""
    return nn.Parameter(torch.rand(*shape))


def cosine_similarity(query: Tensor, keys: Tensor) -> Tensor:
    """Cosine of each query [B, D] with each key [M, D]: [B, M]."""
    return F.normalize(query, dim=1) @ F.normalize(keys, dim=1).T
