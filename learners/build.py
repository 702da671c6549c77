"""Put a learner together from names and numbers, the one place where the tables become objects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from learners.distillers import DISTILLERS
from learners.distillers.base import DistillDims, Distiller, DistillSettings
from learners.optim import OptimSettings
from learners.prompt import PromptLearner
from models.prompted_model import PromptedModel
from models.prompts import PROMPTS
from models.prompts.base import PromptDims
from models.vit import PromptedViT
from utils.parallel import Parallel
from utils.seed import seeded


def build_learner(
    *,
    learner_name: str,
    prompt_param: Sequence[float],
    kd_method: str,
    distill: DistillSettings,
    teacher_vit: PromptedViT | None,
    student_vit: PromptedViT,
    num_classes: int,
    num_tasks: int,
    optim: OptimSettings,
    aux_loss_scale: float,
    seed: int,
    parallel: Parallel,
    **options: Any,
) -> PromptLearner:
    """Build teacher, student and KD method.

    Args:
        learner_name: an entry of PROMPTS.
        prompt_param: its values.
        kd_method: an entry of DISTILLERS.
        distill: numbers of the KD method.
        teacher_vit: the teacher's backbone; not used (may be None) where the method needs no teacher.
        student_vit: the student's and the query's backbone.
        num_classes: C.
        num_tasks: T.
        optim: optimizer and schedule.
        aux_loss_scale: factor of prompt and feature losses.
        seed: every tensor's start is drawn from it, each part from a stream of its own, so that equal parts
            start equal whatever else the run has.
        parallel: where it runs.
        options: further keywords of :class:`PromptLearner`.

    Raises:
        ValueError: names, values or sizes that do not fit; the message says which.
    """
    prompts, problems = PROMPTS[learner_name].parse(prompt_param, num_tasks)
    if problems:
        raise ValueError(f"--prompt_param of {learner_name}: {'; '.join(problems)}")
    distiller_class: type[Distiller] = DISTILLERS.load(kd_method)

    def build_model(role: str, vit: PromptedViT) -> PromptedModel:
        dims = PromptDims(student_vit.embed_dim, vit.embed_dim, vit.depth, num_tasks)
        with seeded(seed, "init", role):
            return PromptedModel(vit, PROMPTS.load(learner_name)(dims=dims, **prompts), num_classes)

    needs_teacher = distiller_class.needs_teacher
    teacher = build_model("teacher", teacher_vit) if needs_teacher else None
    student = build_model("student", student_vit)
    distiller_dims = DistillDims(
        student_dim=student_vit.embed_dim,
        teacher_dim=teacher_vit.embed_dim if needs_teacher else 0,
        student_depth=student_vit.depth,
        teacher_depth=teacher_vit.depth if needs_teacher else 0,
        num_classes=num_classes,
    )
    if distiller_class.needs_blocks and teacher_vit.num_tokens != student_vit.num_tokens:
        raise ValueError(
            f"{kd_method} compares tokens one by one, but the teacher has {teacher_vit.num_tokens} and the "
            f"student {student_vit.num_tokens}; choose models with equal image and patch sizes"
        )
    with seeded(seed, "init", "distiller", kd_method):
        distiller = distiller_class(distill, distiller_dims)
    return PromptLearner(
        student, distiller, teacher, optim, aux_loss_scale=aux_loss_scale, seed=seed, parallel=parallel, **options
    )
