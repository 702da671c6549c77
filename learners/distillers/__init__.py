"""The KD methods by name: the choices of ``--KD_method`` and what each needs of the two models.

A new method takes an entry here and a file beside this one. Reading the table imports no torch.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from models.sizes import ViTSize
from utils.config import NOT_NEGATIVE, TEMPERATURE, DistillConfig, Param
from utils.registry import Entry, Registry, nearest


class ModelPair(NamedTuple):
    """The two models and ``--kd_prompt_param``, which a KD method may restrict."""

    teacher: ViTSize
    student: ViTSize
    kd_prompt_param: tuple[int, int]


def equal_token_counts(pair: ModelPair) -> str | None:
    """The features of teacher and student are compared token by token."""
    teacher, student = pair.teacher.num_tokens, pair.student.num_tokens
    if teacher != student:
        have = f"have {teacher} (--t_model) and {student} (--s_model)"
        way_out = "choose models of the same image and patch size, or another KD method"
        return f"teacher and student must have the same number of tokens, but {have}: {way_out}"


def teacher_at_least_as_deep(pair: ModelPair) -> str | None:
    """Every block of the student is paired with one of the teacher's last blocks."""
    teacher, student = pair.teacher.depth, pair.student.depth
    if teacher < student:
        has = f"has {teacher} (--t_model) against {student} (--s_model): choose a deeper teacher or another KD method"
        return f"the teacher must have at least as many blocks as the student, but {has}"


def kd_prompt_fits(pair: ModelPair) -> str | None:
    """KD prompts belong to blocks of the student; one half of each is keys, the other values."""
    (layers, length), depth = pair.kd_prompt_param, pair.student.depth
    if layers > depth:
        return f"--kd_prompt_param: the first value (layers) must be 1 to {depth}, the depth of --s_model, not {layers}"
    if length % 2:
        return f"--kd_prompt_param: the second value (length) must be even, such as the paper's 6, not {length}"


@dataclass(frozen=True)
class DistillerEntry(Entry):
    """One entry of the DISTILLERS table.

    Attributes:
        requires: what must hold of the models and of ``--kd_prompt_param``; each returns a sentence if it does not.
        needs_teacher: False for a method that trains the student alone.
        fields: the parameters of the method itself.
    """

    requires: tuple[Callable[[ModelPair], str | None], ...] = ()
    needs_teacher: bool = True
    fields: tuple[Param, ...] = ()

    def complete(self, config: DistillConfig) -> tuple[DistillConfig, list[str]]:
        """``config`` with a value for each parameter of the method, and a sentence for each one that is not allowed."""
        given = config.param or {}
        defaults = {field.name: field.type.read([field.default]) for field in self.fields}
        param, problems = dict(defaults), []
        for name in given:
            if not defaults:
                problems.append(f"the method has no parameters, so leave {name} out")
            elif name not in defaults:
                guess = nearest(name, defaults)
                hint = f" (did you mean {guess}?)" if guess else ""
                problems.append(f"there is no {name}{hint}, only {', '.join(defaults)}")
        for field in self.fields:
            try:
                param[field.name] = field.type.read([given.get(field.name, field.default)])
            except ValueError as error:
                problems.append(f"{field.name} {error}")
        return dataclasses.replace(config, param=param, param_defaults=defaults), problems

    def build(self, config: DistillConfig, *arguments: Any) -> Any:
        """The method's object, with all its parameters."""
        return self.load()(self.complete(config)[0], *arguments)


DISTILLERS: Registry[DistillerEntry] = Registry(
    "KD method",
    {
        "KD_Token": DistillerEntry(
            "learners.distillers.kd_token:KDToken",
            "D-CDL: KD token and KD prompts in the student, own head",
            requires=(kd_prompt_fits,),
        ),
        "KD": DistillerEntry(
            "learners.distillers.base:Distiller", "softened logits of the teacher (Hinton et al. 2015)"
        ),
        "DKD": DistillerEntry(
            "learners.distillers.dkd:DKD",
            "decoupled target and non-target logits (Zhao et al. 2022)",
            fields=(
                Param("alpha", 1, NOT_NEGATIVE, "weight of the target class"),
                Param("beta", 4, NOT_NEGATIVE, "weight of the other classes"),
                Param("temperature", 4, TEMPERATURE, "instead of --Soft_T"),
            ),
        ),
        "FitNets": DistillerEntry(
            "learners.distillers.fitnets:FitNets",
            "KD and features of the last block (Romero et al. 2015)",
            requires=(equal_token_counts,),
            fields=(Param("weight", 0.1, NOT_NEGATIVE, "weight of the feature loss"),),
        ),
        "ReviewKD": DistillerEntry(
            "learners.distillers.reviewkd:ReviewKD",
            "KD and fused features of all blocks (Chen et al. 2021)",
            requires=(equal_token_counts, teacher_at_least_as_deep),
            fields=(Param("weight", 0.2, NOT_NEGATIVE, "weight of the feature loss"),),
        ),
        "DIST": DistillerEntry(
            "learners.distillers.dist:DIST",
            "correlations of the probabilities (Huang et al. 2022)",
            fields=(
                Param("beta", 2, NOT_NEGATIVE, "weight of relations between classes"),
                Param("gamma", 2, NOT_NEGATIVE, "weight of relations within a class"),
                Param("temperature", 4, TEMPERATURE, "instead of --Soft_T"),
            ),
        ),
        "LogitStd": DistillerEntry(
            "learners.distillers.logit_std:LogitStd",
            "KD on standardised logits (Sun et al. 2024)",
            fields=(
                Param("weight", 9, NOT_NEGATIVE, "weight of the loss"),
                Param("temperature", 2, TEMPERATURE, "instead of --Soft_T"),
            ),
        ),
        "DeiT-hard": DistillerEntry(
            "learners.distillers.deit_hard:DeiTHard",
            "a token that learns the teacher's decisions (Touvron et al. 2021)",
        ),
        "RKD": DistillerEntry(
            "learners.distillers.rkd:RKD",
            "distances and angles between the images of a batch (Park et al. 2019)",
            fields=(
                Param("distance", 25, NOT_NEGATIVE, "weight of the distances"),
                Param("angle", 50, NOT_NEGATIVE, "weight of the angles"),
            ),
        ),
        "none": DistillerEntry(
            "learners.distillers.base:Distiller", "the student alone, without a teacher", needs_teacher=False
        ),
    },
)
