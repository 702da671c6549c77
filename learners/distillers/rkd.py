"""RKD (Park et al., CVPR 2019, arXiv 1904.05068): relations between the images of a batch."""

import torch.nn.functional as F
from torch import Tensor

from dataloaders.tasks import ClassRange
from learners.distillers.base import Distiller, full_precision
from models.prompted_model import ModelOutput


class RKD(Distiller):
    """``alpha * (distance * L_D + angle * L_A)`` on the class tokens of both models; logits are not compared."""

    mean_over_images = False
    compares_logits = False

    def distill(self, student: ModelOutput, teacher: ModelOutput, targets: Tensor, classes: ClassRange) -> Tensor:
        return self.alpha * rkd_loss(student.features, teacher.features, **self.param)


def rkd_loss(student: Tensor, teacher: Tensor, *, distance: float, angle: float) -> Tensor:
    """``distance * huber(distances) + angle * huber(cosines)`` (arXiv 1904.05068, eq. 5 to 8).

    Distances are of all pairs of images, divided by their mean; cosines are of the angles in all triplets. Huber's loss
    is averaged over pairs and triplets. Features are [B, Ds] and [B, Dt].
    """
    pairs = [_distances_and_cosines(full_precision(features)) for features in (student, teacher)]
    losses = [F.smooth_l1_loss(*relations) for relations in zip(*pairs, strict=True)]
    return distance * losses[0] + angle * losses[1]


def _distances_and_cosines(features: Tensor) -> tuple[Tensor, Tensor]:
    """Relative distances [B, B], and cosines [B, B, B] of the angles at each image (first index)."""
    to_others = features - features[:, None]  # [B, B, D]
    distances = to_others.norm(dim=2)
    number = max(len(features) * (len(features) - 1), 1)  # of pairs of two different images
    unit = F.normalize(to_others, dim=2)
    return distances / (distances.sum() / number).clamp_min(1e-12), unit @ unit.mT
