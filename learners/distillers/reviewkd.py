"""ReviewKD (Chen et al., CVPR 2021, arXiv 2104.09044): every student block reviews the teacher's blocks."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from learners.distillers.base import DistillDims, Distiller, full_precision
from models.prompted_model import ModelOutput
from utils.config import DistillConfig


class Fusion(nn.Module):
    """Attention-based fusion of one block's tokens with those of the next deeper one (arXiv 2104.09044, fig. 3).

    The deepest, first in the chain, has nothing to fuse with. Names of the parts are the original's, which does not
    use the deepest one's ``norm2`` either.
    """

    def __init__(self, student_dim: int, teacher_dim: int, *, deepest: bool) -> None:
        super().__init__()
        self.proj1 = nn.Linear(student_dim, student_dim)
        self.norm1 = nn.LayerNorm(student_dim)
        self.norm2 = nn.LayerNorm(student_dim)
        self.proj2 = nn.Linear(student_dim, teacher_dim)
        if deepest:
            self.norm2.requires_grad_(False)
        else:
            self.projz = nn.Linear(student_dim, student_dim)
            self.normz = nn.LayerNorm(student_dim)

    def forward(self, tokens: Tensor, deeper: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the feature to compare [B, N, Dt] and the fused one to hand on [B, N, Ds]."""
        x = self.norm1(self.proj1(tokens))
        if deeper is not None:
            gate = self.normz(self.projz(torch.stack([x, deeper], dim=1)))  # [B, 2, N, Ds]
            x = self.norm2(x * gate[:, 0] + deeper * gate[:, 1])
        return self.proj2(x), x


class ReviewKD(Distiller):
    """KD, and ``weight`` (0.2) times the mean over the student's blocks of the MSE to the teacher's last L_s blocks."""

    needs_blocks = True

    def __init__(self, config: DistillConfig, dims: DistillDims) -> None:
        super().__init__(config, dims)
        deepest_first = [index == 0 for index in range(dims.student_depth)]
        fusions = [Fusion(dims.student_dim, dims.teacher_dim, deepest=deepest) for deepest in deepest_first]
        self.ReviewKD_layers = nn.ModuleDict({"abfs": nn.ModuleList(fusions)})

    def feature(self, student: ModelOutput, teacher: ModelOutput) -> Tensor:
        losses, fused = [], None
        own, others = reversed(student.blocks), reversed(teacher.blocks)
        for fusion, tokens, target in zip(self.ReviewKD_layers["abfs"], own, others, strict=False):
            feature, fused = fusion(tokens, fused)
            losses.append(F.mse_loss(full_precision(feature), full_precision(target)))
        return self.param["weight"] * torch.stack(losses[::-1]).mean()
