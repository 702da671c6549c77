"""What each saving of the step is worth: the same step without it, measured in turns with the whole step.

    python -m tests.benchmark savings --batch_size 8 --repeats 5

"plain" is a step without any of them, which is how the authors' code computes (but ``evaluate_again`` keeps one query
for both models: without any saving it is ``evaluate``). All variants give the same losses
(``tests/test_benchmark.py``). Every round runs each variant once, and a ratio is the median over rounds of seconds
without / seconds with, so that a machine whose speed drifts does not favour one of them. The expected ratio is that
of the counted arithmetic.
"""

from __future__ import annotations

import contextlib
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import learners.steps
import models.prompts.coda
import models.vit
from learners.learner import TeacherStudentLearner
from learners.speed import count_flops
from tests.benchmark_step import build, make_operations, parser, seconds_of, step_config
from utils.logging import environment

WHOLE, PLAIN = "all", "plain"
_make_query, _answer = learners.steps.make_query, learners.steps.EvalStep.answer  # as they are, with the saving


@contextlib.contextmanager
def weight_gradients(learner: TeacherStudentLearner) -> Iterator[None]:
    """Gradients of the backbones' weights in training, which nobody uses."""
    vits = [model.vit.vit for model in learner.models.values()]
    for vit in vits:
        vit.requires_grad_(True)
    yield
    for vit in vits:
        vit.requires_grad_(False)
        vit.zero_grad(set_to_none=True)


def query_per_model(vit: models.vit.PromptedViT, images: Tensor, **_) -> tuple[Tensor, Tensor]:
    """A second query and a second patch embedding where teacher and student see the batch."""
    _make_query(vit, images)
    query, _ = _make_query(vit, images)
    with torch.no_grad():
        return query, vit.embed(images)


@contextlib.contextmanager
def whole_block(learner: TeacherStudentLearner) -> Iterator[None]:
    """All rows of the last block."""

    def run_block(block: Any, tokens: Tensor, prompt: Any, num_tokens: int | None, rope: Tensor | None) -> Tensor:
        tokens = models.vit.run_block(block, tokens, prompt, None, rope)
        return tokens if num_tokens is None else models.vit._cls_and_extra(tokens, num_tokens)

    for run in (run_block, models.vit.run_block):
        for model in learner.models.values():
            model.vit.run_block = run
        if run is run_block:
            yield


def broadcast_weights(query: Tensor, keys: Tensor, attention: Tensor) -> Tensor:
    """CODA-Prompt's selection by way of a tensor [B, M, D]."""
    attended = torch.nn.functional.normalize(query[:, None] * attention, dim=2)
    return (attended * torch.nn.functional.normalize(keys, dim=1)).sum(2)


def answer_with_new_query(step: learners.steps.EvalStep, images: Tensor, seen: int, _: Tensor | None = None) -> Any:
    """Evaluation that computes a query, also where it is known."""
    return _answer(step, images, seen)


ALL = ("teacher", "student", "evaluate", "evaluate_again")
Without = Callable[[TeacherStudentLearner], contextlib.AbstractContextManager]
SAVINGS: dict[str, tuple[Sequence[str], Without]] = {
    "no weight gradients": (("teacher", "student"), weight_gradients),
    "one query": (("student", "evaluate"), lambda _: patch.object(learners.steps, "make_query", query_per_model)),
    "kept queries": (
        ("evaluate_again",),
        lambda _: patch.object(learners.steps.EvalStep, "answer", answer_with_new_query),
    ),
    "last block's read rows": (ALL, whole_block),
    "fused attention": (ALL, lambda _: sdpa_kernel(SDPBackend.MATH)),
    "selection as products": (ALL, lambda _: patch.object(models.prompts.coda, "component_weights", broadcast_weights)),
}
"""Saving -> the operations that it changes, and how to do without it."""


@contextlib.contextmanager
def without(saving: str, learner: TeacherStudentLearner, operation: str) -> Iterator[None]:
    """Run ``operation`` without one saving, without all that concern it (PLAIN), or with them all (WHOLE)."""
    with contextlib.ExitStack() as stack:
        for name, (operations, leave_out) in SAVINGS.items():
            if saving in (name, PLAIN) and operation in operations:
                stack.enter_context(leave_out(learner))
        yield


def measure(learner: TeacherStudentLearner, name: str, operation: Callable, repeats: int) -> dict[str, dict]:
    """For each variant of an operation: seconds, and ratios to the whole step, measured and of arithmetic."""
    variants = [WHOLE, PLAIN, *(saving for saving in SAVINGS if name in SAVINGS[saving][0])]
    seconds, result = {variant: [] for variant in variants}, {}
    for _ in range(repeats + 1):
        for variant in variants:
            with without(variant, learner, name):
                seconds[variant].append(seconds_of(operation))
    for variant in variants:
        with without(variant, learner, name):
            gflop = count_flops(operation) / 1e9
        ratios = [a / b for a, b in zip(seconds[variant], seconds[WHOLE], strict=True)]
        # The first round is the warm-up.
        result[variant] = {"seconds": statistics.median(seconds[variant][1:]), "ratio": statistics.median(ratios[1:])}
        result[variant] |= {"expected": gflop / result[WHOLE]["gflop"] if variant != WHOLE else 1.0, "gflop": gflop}
    return result


def main(argv: Sequence[str]) -> None:
    """Measure CODA-Prompt in the last of the tasks, when all its components are in use."""
    options, rest = parser("savings", __doc__.split("\n")[0]).parse_known_args(argv)
    config = step_config(options.num_tasks, [*rest, "--learner_name", "CODAPrompt"])
    learner, batch, _ = build(config, options.num_tasks, options.num_tasks)
    operations = make_operations(learner, batch)
    result = {name: measure(learner, name, operation, options.repeats) for name, operation in operations.items()}
    # After task i, the test sets of i tasks are evaluated, i - 1 of them again, which is all the same to a plain step.
    again, plain = (options.num_tasks - 1) / 2, result["evaluate"][PLAIN]["seconds"]
    ours = result["evaluate"][WHOLE]["seconds"] + again * result["evaluate_again"][WHOLE]["seconds"]
    result["evaluation of a run"] = {"ratio": (1 + again) * plain / ours}
    print(json.dumps(result | environment(), indent=2))
