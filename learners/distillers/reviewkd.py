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


class FusionChain(nn.Module):
    """Fusions of all student blocks, the deepest first (``abfs.0``)."""

    def __init__(self, student_dim: int, teacher_dim: int, depth: int) -> None:
        super().__init__()
        self.abfs = nn.ModuleList(Fusion(student_dim, teacher_dim, deepest=index == 0) for index in range(depth))

    def forward(self, blocks: tuple[Tensor, ...]) -> list[Tensor]:
        """Features to compare with the teacher's, in the order of the blocks (shallow first)."""
        features, handed_on = [], None
        for fusion, tokens in zip(self.abfs, reversed(blocks), strict=True):
            feature, handed_on = fusion(tokens, handed_on)
            features.append(feature)
        return features[::-1]


class ReviewKD(Distiller):
    """KD, and ``weight`` (0.2) times the mean over the student's blocks of the MSE to the teacher's last L_s blocks."""

    needs_blocks = True

    def __init__(self, config: DistillConfig, dims: DistillDims) -> None:
        super().__init__(config, dims)
        self.ReviewKD_layers = FusionChain(dims.student_dim, dims.teacher_dim, dims.student_depth)

    def feature(self, student: ModelOutput, teacher: ModelOutput) -> Tensor:
        fused = self.ReviewKD_layers(student.blocks)
        pairs = zip(fused, teacher.blocks[-len(fused) :], strict=True)
        losses = [F.mse_loss(full_precision(f), full_precision(t)) for f, t in pairs]
        return self.param["weight"] * torch.stack(losses).mean()
