"""What each saving of the step is worth: the same step without it, measured in turns with the whole step.

    python -m tests.benchmark savings --batch_size 8 --repeats 5

"plain" is a step without any of them, which is how the authors' code computes: weight gradients of the frozen
backbones (thrown away), a query of its own for teacher and student, all rows of the last block, attention written
out, CODA-Prompt's selection by broadcasting, Gram-Schmidt one projection at a time. All variants give the same
losses (``tests/test_benchmark.py``). Every round runs each variant once, and a ratio is the median over rounds of
seconds without / seconds with, so that a machine whose speed drifts does not favour one of them. The expected ratio
is that of the counted arithmetic. Peak memory is that of a process of its own for each variant.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest.mock import patch

import torch
from learners.assemble import set_precision
from learners.prompt import PromptLearner
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import learners.steps
import models.prompts.coda
import models.vit
from learners.steps import EvalStep, Step, StudentStep, TeacherStep
from tests import benchmark_step
from tests.benchmark_step import count_flops, seconds_of
from utils.logging import environment, peak_memory_mb
from utils.parallel import choose_device

WHOLE, PLAIN = "all", "plain"


@contextlib.contextmanager
def weight_gradients(learner: PromptLearner) -> Iterator[None]:
    """Gradients of the weights of the backbone in training."""
    vits = [model.vit.vit for model in learner.models.values()]
    for vit in vits:
        vit.requires_grad_(True)
    try:
        yield
    finally:
        for vit in vits:
            vit.requires_grad_(False)
            vit.zero_grad(set_to_none=True)


@contextlib.contextmanager
def query_per_model(learner: PromptLearner) -> Iterator[None]:
    """A second query and a second patch embedding where teacher and student see the batch."""
    shared = learners.steps.make_query

    def separate(vit: models.vit.PromptedViT, images: Tensor) -> tuple[Tensor, Tensor]:
        shared(vit, images)
        query, _ = shared(vit, images)
        with torch.no_grad():
            return query, vit.embed(images)

    with patch.object(learners.steps, "make_query", separate):
        yield


@contextlib.contextmanager
def whole_last_block(learner: PromptLearner) -> Iterator[None]:
    run_block = models.vit._run_block

    def whole(block, tokens, prompt, read_from) -> Tensor:
        tokens = run_block(block, tokens, prompt, read_from=None)
        return tokens if read_from is None else models.vit._read_rows(tokens, read_from)

    with patch.object(models.vit, "_run_block", whole):
        yield


@contextlib.contextmanager
def attention_written_out(learner: PromptLearner) -> Iterator[None]:
    with sdpa_kernel(SDPBackend.MATH):
        yield


@contextlib.contextmanager
def selection_by_broadcasting(learner: PromptLearner) -> Iterator[None]:
    def weights(query: Tensor, keys: Tensor, attention: Tensor) -> Tensor:
        attended = torch.nn.functional.normalize(query[:, None] * attention, dim=2)  # [B, M, D]
        return (attended * torch.nn.functional.normalize(keys, dim=1)).sum(2)

    with patch.object(models.prompts.coda, "component_weights", weights):
        yield


@contextlib.contextmanager
def gram_schmidt_one_by_one(learner: PromptLearner) -> Iterator[None]:
    def growth(before: Tensor, draws: Tensor, start: int) -> Tensor:
        rows = torch.zeros(len(before), draws.shape[1])
        rows[:start] = before.flatten(1)[:start]
        for index, draw in enumerate(draws, start):
            row = draw.clone()
            for earlier in rows[:index]:
                row -= (draw @ earlier) / (earlier @ earlier) * earlier
            rows[index] = row
        stop = start + len(draws)
        rows[start:stop] = torch.nn.functional.normalize(rows[start:stop], dim=1)
        return rows.view_as(before)

    with patch.object(models.prompts.coda, "gram_schmidt_growth", growth):
        yield


Without = Callable[[PromptLearner], contextlib.AbstractContextManager[None]]
SAVINGS: dict[str, Without] = {
    "no weight gradients": weight_gradients,
    "one query": query_per_model,
    "last block's read rows": whole_last_block,
    "fused attention": attention_written_out,
    "selection as products": selection_by_broadcasting,
    "Gram-Schmidt as products": gram_schmidt_one_by_one,
}
# The operations that a saving changes; the others are not measured without it.
CHANGES = {
    "no weight gradients": ("teacher", "student"),
    "one query": ("student", "evaluate"),
    "last block's read rows": ("teacher", "student", "evaluate"),
    "fused attention": ("teacher", "student", "evaluate"),
    "selection as products": ("teacher", "student", "evaluate"),
    "Gram-Schmidt as products": ("growth",),
}


@contextlib.contextmanager
def without(saving: str, learner: PromptLearner, operation: str) -> Iterator[None]:
    """Run ``operation`` without one saving, without those that concern it (PLAIN), or with them all (WHOLE)."""
    names = [name for name in SAVINGS if saving in (name, PLAIN) and operation in CHANGES[name]]
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(SAVINGS[name](learner))
        yield


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmark savings", description=__doc__.split("\n")[0])
    parser.add_argument("--KD_method", default="KD_Token")
    parser.add_argument("--prompt_param", type=float, nargs=3, default=(100, 8, 0), help="of CODAPrompt")
    parser.add_argument("--t_model", default="vit_base_patch16_224")
    parser.add_argument("--s_model", default="vit_small_patch16_224")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--precision", choices=benchmark_step.PRECISIONS, default="fp32")
    parser.add_argument("--gpuid", type=int, help="-1 for the CPU; default: GPU 0 if there is one")
    parser.add_argument("--only", nargs="+", choices=(PLAIN, *SAVINGS), help="measure without these; default: each")
    parser.add_argument("--peak", choices=(WHOLE, PLAIN), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    argv = sys.argv[2:] if argv is None else argv
    options = parse(argv)
    device = choose_device(None, None if options.gpuid is None else (options.gpuid,))
    learner, batch = build(options, device)
    operations = make_operations(learner, batch)
    if options.peak:
        result = peak(learner, operations, options.peak, device)
    else:
        result = measure(learner, operations, device, options.repeats, options.only or (PLAIN, *SAVINGS))
        result |= {"peak_mb": {variant: peak_of_process(argv, variant) for variant in (WHOLE, PLAIN)}}
        result |= {"threads": torch.get_num_threads(), "options": vars(options), **environment()}
    sys.stdout.write(json.dumps(result, indent=None if options.peak else 2) + "\n")
    return 0


def build(options: argparse.Namespace, device: torch.device) -> tuple[PromptLearner, tuple]:
    """CODA-Prompt in the last of 10 tasks, when all its components are in use, and a random batch."""
    names = ("KD_method", "t_model", "s_model", "batch_size", "precision")
    arguments = [text for name in names for text in (f"--{name}", str(getattr(options, name)))]
    arguments += ["--prompt_param", *map(str, options.prompt_param)]
    step_options = benchmark_step.parse([*arguments, "--learner_name", "CODAPrompt", "--task", "10"])
    set_precision(step_options.precision)
    learner, _ = benchmark_step.build(step_options, device)
    return learner, benchmark_step.random_batch(step_options, learner, device)


def make_operations(learner: PromptLearner, batch: tuple) -> benchmark_step.Operations:
    """A step of each phase, the evaluation of the batch, and the growth of the pools to the last task."""
    images, targets, classes = batch

    def training(step: Step) -> Callable[[], Any]:
        trained = step.trained_parameters()  # before a variant gives the backbones gradients
        optimizer = torch.optim.Adam(trained, fused=True)

        def run() -> dict[str, Tensor]:
            step.train()
            for model in learner.models.values():
                model.vit.vit.zero_grad(set_to_none=True)
            optimizer.zero_grad()
            result = step(images, targets, classes)
            result["loss"].mean().backward()
            optimizer.step()
            return result

        return run

    @torch.inference_mode()
    def evaluate() -> dict[str, Tensor]:
        step = EvalStep(learner.query_vit, learner.student, learner.distiller, learner.teacher)
        return step(images, targets, classes.stop)

    def growth() -> None:
        learner.begin_task(9)

    steps = {
        "teacher": TeacherStep(learner.query_vit, learner.teacher),
        "student": StudentStep(learner.query_vit, learner.student, learner.distiller, learner.teacher),
    }
    operations = {role: training(step.to(images.device)) for role, step in steps.items()}
    return operations | {"evaluate": evaluate, "growth": growth}


def measure(
    learner: PromptLearner,
    operations: benchmark_step.Operations,
    device: torch.device,
    repeats: int,
    savings: Sequence[str],
) -> dict[str, Any]:
    """For each operation and variant: seconds, and ratios to the whole step, measured and of arithmetic."""
    result = {}
    for name, operation in operations.items():
        variants = [WHOLE, *(saving for saving in savings if saving == PLAIN or name in CHANGES[saving])]
        seconds: dict[str, list[float]] = {variant: [] for variant in variants}
        for turn in range(repeats + 1):
            for variant in variants:
                with without(variant, learner, name):
                    elapsed = seconds_of(operation, device)
                if turn:  # the first is the warm-up
                    seconds[variant].append(elapsed)
        flops = {}
        for variant in variants:
            with without(variant, learner, name):
                flops[variant] = count_flops(operation)
        result[name] = {
            variant: {
                "seconds": statistics.median(seconds[variant]),
                "ratio": statistics.median(a / b for a, b in zip(seconds[variant], seconds[WHOLE], strict=True)),
                "expected": flops[variant] / flops[WHOLE] if flops[WHOLE] else None,
                "gflop": flops[variant] / 1e9,
            }
            for variant in variants
        }
    return result


def peak(
    learner: PromptLearner, operations: benchmark_step.Operations, variant: str, device: torch.device
) -> dict[str, float]:
    for name, operation in operations.items():
        for _ in range(2):
            with without(variant, learner, name):
                operation()
    return peak_memory_mb()


def peak_of_process(argv: list[str], variant: str) -> dict[str, float]:
    command = [sys.executable, "-m", "tests.benchmark", "savings", *argv, "--peak", variant]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
