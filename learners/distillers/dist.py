"""DIST (Huang et al., NeurIPS 2022, arXiv 2205.10536): correlations of the probabilities instead of their values."""

import torch.nn.functional as F
from torch import Tensor

from dataloaders.tasks import ClassRange
from learners.distillers.base import Distiller, full_precision
from models.prompted_model import ModelOutput


class DIST(Distiller):
    """``alpha * (beta * inter-class + gamma * intra-class)`` on the current task's columns of both class heads."""

    mean_over_images = False

    def distill(self, student: ModelOutput, teacher: ModelOutput, targets: Tensor, classes: ClassRange) -> Tensor:
        active = slice(*classes)
        return self.alpha * dist_loss(student.logits[:, active], teacher.logits[:, active], **self.param)


def dist_loss(student: Tensor, teacher: Tensor, *, beta: float, gamma: float, temperature: float) -> Tensor:
    """``tau^2 * (beta * mean_i d(S_i, T_i) + gamma * mean_j d(S^j, T^j))`` (arXiv 2205.10536, section 4).

    S and T are the probabilities softmax(logits / tau) of student and teacher, [B, K]; ``d`` is 1 minus Pearson's
    correlation, of an image's row (relations between classes) or of a class's column (relations within it).
    """
    s, t = (F.softmax(full_precision(logits) / temperature, dim=1) for logits in (student, teacher))
    inter, intra = (1 - _correlation(s, t, dim).mean() for dim in (1, 0))
    return temperature**2 * (beta * inter + gamma * intra)


def _correlation(a: Tensor, b: Tensor, dim: int) -> Tensor:
    a, b = (x - x.mean(dim, keepdim=True) for x in (a, b))
    return F.cosine_similarity(a, b, dim=dim)
