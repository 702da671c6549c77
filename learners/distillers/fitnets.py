"""FitNets (Romero et al., ICLR 2015, arXiv 1412.6550): the student's last features follow the teacher's."""

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn

from learners.distillers.base import DistillDims, Distiller, full_precision
from models.prompted_model import ModelOutput
from utils.config import DistillConfig


class FitNets(Distiller):
    """KD, and ``weight`` (0.1) times the MSE of the last blocks' tokens (before the norm), the student's projected."""

    needs_blocks = True

    def __init__(self, config: DistillConfig, dims: DistillDims) -> None:
        super().__init__(config, dims)
        # [B, N, Ds] to [B, N, Dt], under the original's name project_t_s.proj
        self.project_t_s = nn.Sequential(OrderedDict(proj=nn.Linear(dims.student_dim, dims.teacher_dim)))

    def feature(self, student: ModelOutput, teacher: ModelOutput) -> Tensor:
        projected = self.project_t_s(student.blocks[-1])
        return self.param["weight"] * F.mse_loss(full_precision(projected), full_precision(teacher.blocks[-1]))
