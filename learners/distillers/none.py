"""No distillation: the student learns alone (the paper's rows without a teacher)."""

from __future__ import annotations

from torch import Tensor

from dataloaders.tasks import ClassRange
from learners.distillers.base import Distiller, task_cross_entropy
from models.prompted_model import ModelOutput


class NoDistillation(Distiller):
    """Plain cross entropy with weight 1; no teacher is built or trained."""

    needs_teacher = False

    def forward(
        self,
        student: ModelOutput,
        teacher: ModelOutput | None,
        targets: Tensor,
        classes: ClassRange,
        class_weights: Tensor | None = None,
    ) -> dict[str, Tensor]:
        return {"ce": task_cross_entropy(student.logits, targets, classes, class_weights)}
