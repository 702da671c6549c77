"""LogitStd (Sun et al., CVPR 2024, arXiv 2403.01427): KD on standardised logits, whatever their scale."""

import torch.nn.functional as F
from torch import Tensor

from dataloaders.tasks import ClassRange
from learners.distillers.base import Distiller, full_precision, kd_loss
from models.prompted_model import ModelOutput


class LogitStd(Distiller):
    """``alpha * weight * tau^2 * KL`` between the standardised logits of both class heads, of the current task."""

    def distill(self, student: ModelOutput, teacher: ModelOutput, targets: Tensor, classes: ClassRange) -> Tensor:
        logits = (standardise(output.logits[:, slice(*classes)]) for output in (student, teacher))
        return self.alpha * self.param["weight"] * kd_loss(*logits, temperature=self.param["temperature"])


def standardise(logits: Tensor) -> Tensor:
    """``(z - mean(z)) / std(z)`` of each image's logits z [B, K], the Z-score of arXiv 2403.01427, section 4."""
    return F.layer_norm(full_precision(logits), logits.shape[1:], eps=1e-14)
