"""APT (Chen et al., Additive Prompt Tuning, ICCV 2025, arXiv 2503.07979), as in the authors' code of CDL."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.prompts.base import PromptDims, PromptOutput, PromptPool
from models.vit import KV, LayerPrompt


class APT(PromptPool):
    """Two vectors per block, added to the class token's key and value; one set for all tasks and images.

    Parameters: ``prompt_tokens`` [2 L, D], used in training. A buffer of the same shape, ``global_merged_prompt``, is
    their moving average over the tasks, used otherwise: so a student learns from a teacher with the prompts merged
    before the current task, in the first one with zeros. That is the original's, as are the head's fixed norm and bias.

    Args:
        dropout: without effect, as in the original.
        ema_coeff: weight of the former average where a task is merged into it.
    """

    needs_query = False

    def __init__(self, *, dropout: float, ema_coeff: float, dims: PromptDims) -> None:
        super().__init__(dims)
        self.ema_coeff = ema_coeff
        shape = (2 * dims.depth, dims.embed_dim)
        self.prompt_tokens = nn.Parameter(0.02 * torch.randn(shape))
        self.register_buffer("global_merged_prompt", torch.zeros(shape))

    def forward(self, query: None) -> PromptOutput:
        rows = (self.prompt_tokens if self.training else self.global_merged_prompt)[:, None, None]  # [2 L, 1, 1, D]
        return PromptOutput([LayerPrompt(cls_add=KV(*pair)) for pair in rows.split(2)])

    def end_task(self, task: int) -> None:
        """Merge the prompts: ``e * merged + (1 - e) * prompt_tokens``, after the first task the prompts alone."""
        e = self.ema_coeff if task > 0 else 0.0
        self.global_merged_prompt.mul_(e).add_(self.prompt_tokens, alpha=1 - e)

    def make_head(self, width: int, num_classes: int) -> nn.Module:
        return UnitHead(width, num_classes)


class UnitHead(nn.Linear):
    """Logits ``LN(x) W^T + b`` with the rows of W scaled to length 1; the LayerNorm has no parameters."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.layer_norm(x, x.shape[-1:]), F.normalize(self.weight, dim=1), self.bias)
