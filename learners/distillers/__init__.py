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
    """The two models and ``--kd_prompt_param``, which a KD method may restrict; unknown sizes are None."""

    teacher: ViTSize | None
    student: ViTSize | None
    kd_prompt_param: tuple[int, int]


def equal_token_counts(pair: ModelPair) -> str | None:
    """The features of teacher and student are compared token by token."""
    teacher, student = pair.teacher, pair.student
    if teacher is None or student is None or teacher.num_tokens == student.num_tokens:
        return None
    return (
        f"teacher and student must have equally many tokens, but have {teacher.num_tokens} (--t_model) and"
        f" {student.num_tokens} (--s_model): choose models of the same image and patch size, or another KD method"
    )


def teacher_at_least_as_deep(pair: ModelPair) -> str | None:
    """Every block of the student is paired with one of the teacher's last blocks."""
    teacher, student = pair.teacher, pair.student
    if teacher is None or student is None or teacher.depth >= student.depth:
        return None
    return (
        f"the teacher must have at least as many blocks as the student, but has {teacher.depth} (--t_model) against"
        f" {student.depth} (--s_model): choose a deeper teacher or another KD method"
    )


def kd_prompt_fits(pair: ModelPair) -> str | None:
    """KD prompts belong to blocks of the student; one half of each is keys, the other values."""
    (layers, length), student = pair.kd_prompt_param, pair.student
    if student is not None and layers > student.depth:
        return (
            f"--kd_prompt_param: the first value (layers) must be 1 to {student.depth}, the number of blocks of"
            f" --s_model, not {layers}"
        )
    if length % 2:
        return (
            "--kd_prompt_param: the second value (length) must be even (one half keys, one half values), not"
            f" {length}; the paper's is 6"
        )
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

    def problems(self, pair: ModelPair) -> list[str]:
        """One sentence for each requirement that ``pair`` does not meet."""
        return [problem for require in self.requires if (problem := require(pair)) is not None]


DISTILLERS: Registry[DistillerEntry] = Registry(
    "KD method",
    {
        "KD_Token": DistillerEntry(
            "learners.distillers.kd_token:KDToken",
            "KDP: KD token and KD prompts in the student, own head",
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
