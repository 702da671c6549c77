"""The arithmetic of a run, counted, and the rate at which the device does it."""

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from learners.learner import TaskTraining, TeacherStudentLearner

IMAGES = 2  # in the batch that is counted; a method may compare images


class _NoModules(contextlib.nullcontext):
    """In place of the counter's record of modules, which fails in inference mode."""

    parents = ("Global",)


def count_flops(operation: Callable[[], Any]) -> int:
    """FLOPs (2 per multiply-add) of all matrix products, those of attention among them (hence its plain kernel)."""
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = _NoModules()
    with sdpa_kernel(SDPBackend.MATH), counter:
        operation()
    return counter.get_total_flops()


def flop_per_image(learner: TeacherStudentLearner, training: TaskTraining | None = None) -> float:
    """FLOPs of a step of ``training`` per image, or of an evaluation with a query that is known; changes nothing."""
    size, device = learner.query_vit.image_size, learner.parallel.device
    images = torch.zeros(IMAGES, 3, size, size, device=device)
    query = None
    if learner.student.prompt.needs_query:
        query = torch.zeros(IMAGES, learner.query_vit.embed_dim, device=device)

    def evaluate() -> None:
        with torch.no_grad():
            learner.eval_step().answer(images, 1, query)

    def train() -> None:
        targets = torch.full((IMAGES,), training.classes.start, device=device)
        loss = training.step(images, targets, training.classes).loss.sum()
        torch.autograd.grad(loss, training.parameters, allow_unused=True)

    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        return count_flops(train if training else evaluate) / IMAGES


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large product of two matrices, the best of a few; takes less than 0.2 s on most devices."""
    size, number = (4096, 5) if device.type == "cuda" else (1024, 1)
    # On GPUs the product of constant matrices would be faster.
    matrix = torch.rand(size, size, device=device, generator=torch.Generator(device).manual_seed(0)).to(dtype)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(number):
            product = matrix @ matrix
        product[0, 0].item()  # waits for the device
        seconds.append(time.perf_counter() - start)
    return 2 * number * size**3 / min(seconds)


def speed_by_phase(phases: Sequence[Mapping[str, Any]], speed: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Rates of ``teacher``, ``student`` and ``evaluation`` over all tasks, from a :class:`learners.results.History`."""
    result = {}
    for phase in dict.fromkeys(entry["phase"] for entry in phases):
        names = ("seconds", "waited_for_data", "images")
        seconds, waited, images = (sum(x[name] for x in phases if x["phase"] == phase) for name in names)
        rate = images / max(seconds, 1e-9)
        result[phase] = {
            "gflop_per_image": speed[phase] / 1e9,
            "images_per_second": rate,
            "tflop_per_second": rate * speed[phase] / 1e12,
            "share_of_product": rate * speed[phase] / speed["product"],
            "seconds": seconds,
            "waited_for_data": waited,
        }
    return result
