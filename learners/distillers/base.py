"""The base of all KD methods: an objective for the student, with trainable parts of its own if it needs any."""

from collections.abc import Callable
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataloaders.tasks import ClassRange
from models.prompted_model import ModelOutput, StudentInputs
from utils.config import DistillConfig


class DistillDims(NamedTuple):
    """What a KD method may need of the models: widths and depths of both, the number of classes C, the student's head.

    ``make_head(width, C)`` makes a new head like the student's.
    """

    student_dim: int
    teacher_dim: int
    student_depth: int
    teacher_depth: int
    num_classes: int
    make_head: Callable[[int, int], nn.Module] = nn.Linear


class Distiller(nn.Module):
    """The student's objective: ``(1 - alpha) * CE + distill + feature``; without a teacher the cross entropy alone.

    By itself it is KD: soft targets on the class head (Hinton et al. 2015, arXiv 1503.02531). Another method overrides
    :meth:`distill` and, if it needs to, :meth:`feature`, :meth:`student_inputs` and :meth:`predict`. Parameters that
    it registers are trained with the student and saved with it.

    Attributes:
        param: the parameters of the method itself, by the names in the table.
        needs_blocks: whether the method reads the outputs of both models' blocks.
        mean_over_images: whether each term is a mean over the images. False where images are compared with each
            other: a batch in parts, on several devices or by ``accumulate``, is then not the whole batch.
        compares_logits: whether the term ``distill`` is zero where both models have the same logits.
    """

    needs_blocks: ClassVar[bool] = False
    mean_over_images: ClassVar[bool] = True
    compares_logits: ClassVar[bool] = True

    def __init__(self, config: DistillConfig, dims: DistillDims) -> None:
        super().__init__()
        self.alpha = config.alpha
        self.temperature = config.temperature
        self.param = config.param

    @property
    def affects_answers(self) -> bool:
        """Whether the student's answers depend on the method, whose parts evaluation then needs."""
        own = type(self)
        return own.predict is not Distiller.predict or own.student_inputs is not Distiller.student_inputs

    def student_inputs(self) -> StudentInputs:
        """Prompts and tokens to inject into the student."""
        return StudentInputs()

    def forward(
        self,
        student: ModelOutput,
        teacher: ModelOutput | None,
        targets: Tensor,
        classes: ClassRange,
        class_weights: Tensor | None = None,
        progress: float = 0.0,
    ) -> dict[str, Tensor]:
        """All terms of the loss by name, each a scalar with its weight: ``ce``, ``distill``, ``feature``.

        Args:
            teacher: its output for the same images, without gradient; None where there is no teacher.
            targets: labels [B].
            classes: columns that compete.
            class_weights: a weight for each class [C], or None.
            progress: share of the student's epochs on the task that are done, for a method that warms up.
        """
        ce = task_cross_entropy(student.logits, targets, classes, class_weights)
        if teacher is None:
            return {"ce": ce}
        terms = {"ce": (1 - self.alpha) * ce, "distill": self.distill(student, teacher, targets, classes)}
        feature = self.feature(student, teacher)
        return terms if feature is None else {**terms, "feature": feature}

    def distill(self, student: ModelOutput, teacher: ModelOutput, targets: Tensor, classes: ClassRange) -> Tensor:
        """The distillation term with its weight alpha; by default Hinton's on the class head."""
        active = slice(*classes)
        return self.alpha * kd_loss(student.logits[:, active], teacher.logits[:, active], temperature=self.temperature)

    def feature(self, student: ModelOutput, teacher: ModelOutput) -> Tensor | None:
        """The loss between features, with its weight, to which ``aux_loss_scale`` applies; by default none."""
        return None

    def predict(self, student: ModelOutput) -> Tensor:
        """Logits [B, C] that the student answers with."""
        return student.logits


def task_cross_entropy(
    logits: Tensor, targets: Tensor, classes: ClassRange, class_weights: Tensor | None = None
) -> Tensor:
    """Cross entropy of logits [B, C] in which only ``classes``, those of the labels [B], compete.

    ``class_weights`` is a weight for each class [C]; the mean is still taken over the batch.
    """
    competing = full_precision(logits[:, slice(*classes)])
    losses = F.cross_entropy(competing, targets - classes.start, reduction="none")
    if class_weights is not None:
        losses = losses * class_weights[targets]
    return losses.mean()


def kd_loss(student: Tensor, teacher: Tensor, *, temperature: float) -> Tensor:
    """``tau^2 * KL(softmax(teacher / tau) || softmax(student / tau))`` (Hinton et al. 2015, eq. 1).

    Logits are [B, K]; the mean is over the batch.
    """
    student_log = F.log_softmax(full_precision(student) / temperature, dim=1)
    teacher_log = F.log_softmax(full_precision(teacher) / temperature, dim=1)
    return temperature**2 * F.kl_div(student_log, teacher_log, reduction="batchmean", log_target=True)


def full_precision(x: Tensor) -> Tensor:
    """``x`` in float32, or unchanged if it is more precise: losses are never computed in half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
