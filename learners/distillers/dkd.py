"""DKD (Zhao et al., CVPR 2022, arXiv 2203.08679): target and non-target classes distilled apart."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dataloaders.tasks import ClassRange
from learners.distillers.base import Distiller, full_precision
from models.prompted_model import ModelOutput


class DKD(Distiller):
    """``alpha * (1 * TCKD + 4 * NCKD)`` on the current task's columns, at a temperature of its own (4)."""

    def distill(self, student: ModelOutput, teacher: ModelOutput, targets: Tensor, classes: ClassRange) -> Tensor:
        active = slice(*classes)
        logits = student.logits[:, active], teacher.logits[:, active]
        return self.alpha * dkd_loss(*logits, targets - classes.start, **self.param)


def dkd_loss(
    student: Tensor, teacher: Tensor, target: Tensor, *, alpha: float, beta: float, temperature: float
) -> Tensor:
    """``alpha * TCKD + beta * NCKD`` (arXiv 2203.08679, eq. 7), each summed and divided by B.

    Args:
        student, teacher: logits [B, K].
        target: labels [B] in [0, K).
        alpha, beta: weights of the target and the non-target part.
        temperature: tau; both parts are scaled by tau^2.
    """
    student, teacher = full_precision(student) / temperature, full_precision(teacher) / temperature
    if student.shape[1] < 2:
        return student.sum() * 0  # a single class has no others to tell apart
    tckd = _kl(_two_way_log(student, target), _two_way_log(teacher, target))
    # Leaves the target no probability; F.one_hot would make a GPU's host wait for the largest label.
    hide = torch.zeros_like(student).scatter(1, target[:, None], 1000.0)
    nckd = _kl(F.log_softmax(student - hide, dim=1), F.log_softmax(teacher - hide, dim=1))
    return temperature**2 * (alpha * tckd + beta * nckd)


def _two_way_log(logits: Tensor, target: Tensor) -> Tensor:
    """Log probabilities of (true class, all others), [B, 2], summed in log space so that none becomes 0."""
    log_prob, column = F.log_softmax(logits, dim=1), target[:, None]
    others = log_prob.scatter(1, column, float("-inf")).logsumexp(dim=1)
    # gather, as a mask of hits makes a GPU's host wait for their number
    return torch.stack([log_prob.gather(1, column).squeeze(1), others], dim=1)


def _kl(student_log: Tensor, teacher_log: Tensor) -> Tensor:
    return F.kl_div(student_log, teacher_log, reduction="batchmean", log_target=True)
