"""One training or evaluation step, from images to losses and counts: the unit that runs on a device.

A step holds every trained parameter and computes the losses itself, so that several devices exchange scalars and
gradients only. Everything it returns is a vector of one element per replica: losses are averaged over replicas, counts
are summed.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from dataloaders.tasks import ClassRange
from learners.distillers.base import Distiller, task_cross_entropy
from models.prompted_model import ModelOutput, PromptedModel
from models.vit import PromptedViT


class StepResult(NamedTuple):
    """Result of a training step."""

    loss: Tensor  # total, [1], with gradient
    terms: dict[str, Tensor]  # of which the loss is the sum, by name, [1] each
    correct: Tensor  # number of correct predictions, [1]
    gradient: Tensor | None = None  # its norm, a scalar, once the batch has gone backward


class EvalResult(NamedTuple):
    """Result of an evaluation step."""

    correct: dict[str, Tensor]  # number of correct predictions by role, [1] each
    not_finite: Tensor  # number of logits of both models that are infinite or not a number, [1]
    query: Tensor | None  # of the images, [B, Dq], if the pools need it


class Step(nn.Module):
    """Base of the training steps.

    ``forward(images, targets, classes, progress)`` takes images [B, 3, H, W] in [0, 1], labels [B], the columns that
    compete, and the share of the epochs on the task that are done.

    Args:
        query_vit: the frozen ViT that gives the query (the student's backbone, without prompts).
        aux_loss_scale: factor of prompt and feature losses; 2.0 reproduces the original on two GPUs, which
            sums these losses over its replicas.
        class_weights: a weight for each class [C] in the cross entropy, or None.
    """

    def __init__(
        self, query_vit: PromptedViT, *, aux_loss_scale: float = 1.0, class_weights: Tensor | None = None
    ) -> None:
        super().__init__()
        self.query_vit = query_vit
        self.aux_loss_scale = aux_loss_scale
        self.register_buffer("class_weights", class_weights, persistent=False)

    def _result(self, terms: dict[str, Tensor], logits: Tensor, targets: Tensor, classes: ClassRange) -> StepResult:
        """Add up the terms and count the answers that are right among ``classes``."""
        best = logits[:, slice(*classes)].argmax(1) + classes.start
        return StepResult(
            loss=sum(terms.values()).reshape(1),
            terms={name: term.detach().reshape(1) for name, term in terms.items()},
            correct=(best == targets).sum().reshape(1),
        )


class TeacherStep(Step):
    """``CE(current task's columns) + aux_loss_scale * prompt loss`` for the teacher."""

    def __init__(self, query_vit: PromptedViT, teacher: PromptedModel, **options) -> None:
        super().__init__(query_vit, **options)
        self.teacher = teacher

    def forward(self, images: Tensor, targets: Tensor, classes: ClassRange, progress: float = 0.0) -> StepResult:
        """Losses of a batch, with the terms ``ce`` and ``prompt``."""
        query = make_query(self.query_vit, images)[0] if self.teacher.prompt.needs_query else None
        output = self.teacher(self.teacher.vit.embed(images), query)
        terms = {
            "ce": task_cross_entropy(output.logits, targets, classes, self.class_weights),
            "prompt": self.aux_loss_scale * output.prompt_loss,
        }
        return self._result(terms, output.logits, targets, classes)


class StudentStep(Step):
    """The objective of student and distiller, with the frozen teacher inside (arXiv 2407.13911, section 4).

    The teacher, None where the method needs none, computes no gradients and remains in evaluation mode.
    """

    def __init__(self, student: PromptedModel, distiller: Distiller, teacher: PromptedModel | None, **options) -> None:
        super().__init__(student.vit, **options)
        self.student = student
        self.distiller = distiller
        self.teacher = teacher

    def train(self, mode: bool = True) -> "StudentStep":
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def forward(self, images: Tensor, targets: Tensor, classes: ClassRange, progress: float = 0.0) -> StepResult:
        """Losses of a batch: ``ce``, ``prompt``, and where the method has them ``distill`` and ``feature``."""
        query, tokens = make_query(self.query_vit, images, needed=self.student.prompt.needs_query)
        teacher = self._teach(images, query) if self.teacher is not None else None
        inputs = self.distiller.student_inputs()
        student = self.student(tokens, query, inputs, return_blocks=self.distiller.needs_blocks)
        predicted = self.distiller.predict(student)
        terms = self.distiller(student, teacher, targets, classes, self.class_weights, progress)
        for name, term in terms.items():
            if term.shape != ():
                method, shape = type(self.distiller).__name__, tuple(term.shape)
                raise ValueError(f"{method}: the term {name!r} of the loss must be a scalar, but has the shape {shape}")
        if "feature" in terms:
            terms["feature"] = self.aux_loss_scale * terms["feature"]
        terms["prompt"] = self.aux_loss_scale * student.prompt_loss
        return self._result(terms, predicted, targets, classes)

    def _teach(self, images: Tensor, query: Tensor | None) -> ModelOutput:
        # A loss can keep nothing for its gradient that was made in inference mode: logits are copied, all blocks'
        # outputs would be too much.
        if self.distiller.needs_blocks:
            with torch.no_grad():
                return self.teacher(self.teacher.vit.embed(images), query, return_blocks=True)
        with torch.inference_mode():
            output = self.teacher(self.teacher.vit.embed(images), query)
        logits, features, extra, blocks, prompt_loss = output
        return ModelOutput(logits.clone(), features.clone(), extra.clone(), blocks, prompt_loss.clone())


class EvalStep(nn.Module):
    """Correct predictions of teacher (or None) and student over all classes seen, from one query."""

    def __init__(self, student: PromptedModel, distiller: Distiller, teacher: PromptedModel | None) -> None:
        super().__init__()
        self.student = student
        self.distiller = distiller
        self.teacher = teacher
        self.eval()

    def forward(self, images: Tensor, targets: Tensor, seen: int, query: Tensor | None = None) -> EvalResult:
        """Count correct top-1 answers among the first ``seen`` classes; the caller enters inference mode.

        ``query`` [B, Dq] is that of an earlier evaluation of the images, None if there was none.
        """
        query, logits = self.answer(images, seen, query)
        correct = {role: (x.argmax(1) == targets).sum().reshape(1) for role, x in logits.items()}
        return EvalResult(correct, sum((~x.isfinite()).sum() for x in logits.values()).reshape(1), query)

    def answer(self, images: Tensor, seen: int, query: Tensor | None = None) -> tuple[Tensor | None, dict[str, Tensor]]:
        """The query, and the logits [B, seen] of ``student`` and, where there is one, ``teacher``."""
        missing = query is None and self.student.prompt.needs_query
        new, tokens = make_query(self.student.vit, images, needed=missing)
        query = new if missing else query
        output = self.student(tokens, query, self.distiller.student_inputs())
        result = {"student": self.distiller.predict(output)}
        if self.teacher is not None:
            result["teacher"] = self.teacher(self.teacher.vit.embed(images), query).logits
        return query, {role: logits[:, :seen].float() for role, logits in result.items()}


def make_query(vit: PromptedViT, images: Tensor, *, needed: bool = True) -> tuple[Tensor | None, Tensor]:
    """The query [B, Dq] (final-norm class token, no prompts, no gradient) if needed, and the embedded tokens."""
    with torch.no_grad():
        tokens = vit.embed(images)
        return vit(tokens).cls if needed else None, tokens
