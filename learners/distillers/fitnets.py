"""FitNets (Romero et al., ICLR 2015, arXiv 1412.6550): the student's last features follow the teacher's."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from learners.distillers.base import DistillDims, Distiller, full_precision
from models.prompted_model import ModelOutput
from utils.config import DistillConfig

FEATURE_WEIGHT = 0.1


class Projector(nn.Module):
    """Linear map from the student's width to the teacher's, [B, N, Ds] to [B, N, Dt]."""

    def __init__(self, student_dim: int, teacher_dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(student_dim, teacher_dim)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.proj(tokens)


class FitNets(Distiller):
    """KD, and 0.1 times the MSE between the projected and the teacher's last block's tokens, before the norm."""

    needs_blocks = True

    def __init__(self, config: DistillConfig, dims: DistillDims) -> None:
        super().__init__(config, dims)
        self.project_t_s = Projector(dims.student_dim, dims.teacher_dim)

    def feature(self, student: ModelOutput, teacher: ModelOutput | None) -> Tensor:
        projected = self.project_t_s(student.blocks[-1])
        return FEATURE_WEIGHT * F.mse_loss(full_precision(projected), full_precision(teacher.blocks[-1]))
