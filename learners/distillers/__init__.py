"""The KD methods by name: the choices of ``--KD_method`` and what each needs of the two models.

A new method is one line here and one file beside this one. Reading the table imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from models.sizes import ViTSize
from utils.registry import Entry, Registry


class ModelPair(NamedTuple):
    """The two models and ``--kd_prompt_param``, which a KD method may restrict."""

    teacher: ViTSize
    student: ViTSize
    kd_prompt_param: tuple[int, int]


def equal_token_counts(pair: ModelPair) -> str | None:
    """The features of teacher and student are compared token by token."""
    teacher, student = pair.teacher.num_tokens, pair.student.num_tokens
    if teacher == student:
        return None
    return (
        f"teacher and student must have equally many tokens, but have {teacher} (--t_model) and {student} (--s_model):"
        " choose models of the same image and patch size, or another KD method"
    )


def teacher_at_least_as_deep(pair: ModelPair) -> str | None:
    """Every block of the student is paired with one of the teacher's last blocks."""
    teacher, student = pair.teacher.depth, pair.student.depth
    if teacher >= student:
        return None
    return (
        f"the teacher must have at least as many blocks as the student, but has {teacher} (--t_model) against"
        f" {student} (--s_model): choose a deeper teacher or another KD method"
    )


def kd_prompt_fits(pair: ModelPair) -> str | None:
    """KD prompts belong to blocks of the student; one half of each is keys, the other values."""
    (layers, length), depth = pair.kd_prompt_param, pair.student.depth
    if layers > depth:
        return f"--kd_prompt_param: the first value (layers) must be 1 to {depth}, the depth of --s_model, not {layers}"
    if length % 2:
        return f"--kd_prompt_param: the second value (length) must be even, such as the paper's 6, not {length}"
    return None


@dataclass(frozen=True)
class DistillerEntry(Entry):
    """One line of the DISTILLERS table.

    Attributes:
        requires: what must hold of the models and of ``--kd_prompt_param``; each returns a sentence if it does not.
        needs_teacher: False for a method that trains the student alone.
    """

    requires: tuple[Callable[[ModelPair], str | None], ...] = ()
    needs_teacher: bool = True


DISTILLERS: Registry[DistillerEntry] = Registry(
    "KD method",
    {
        "KD_Token": DistillerEntry(
            "learners.distillers.kd_token:KDToken",
            "D-CDL: KD token and KD prompts in the student, own head",
            requires=(kd_prompt_fits,),
        ),
        "KD": DistillerEntry("learners.distillers.kd:KD", "softened logits of the teacher (Hinton et al. 2015)"),
        "DKD": DistillerEntry(
            "learners.distillers.dkd:DKD", "decoupled target and non-target logits (Zhao et al. 2022)"
        ),
        "FitNets": DistillerEntry(
            "learners.distillers.fitnets:FitNets",
            "KD and features of the last block (Romero et al. 2015)",
            requires=(equal_token_counts,),
        ),
        "ReviewKD": DistillerEntry(
            "learners.distillers.reviewkd:ReviewKD",
            "KD and fused features of all blocks (Chen et al. 2021)",
            requires=(equal_token_counts, teacher_at_least_as_deep),
        ),
        "none": DistillerEntry(
            "learners.distillers.none:NoDistillation", "the student alone, without a teacher", needs_teacher=False
        ),
    },
)
