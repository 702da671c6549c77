"""Time, memory and arithmetic of one training step of each phase and of evaluation, with random weights.

    python -m tests.benchmark step --learner_name CODAPrompt --KD_method KD_Token --batch_size 8 --json

prints one JSON object:

- ``teacher_s``, ``student_s``, ``evaluate_s``: medians in seconds of a whole step (query, losses, backward pass,
  optimizer) and of the evaluation of a batch by both models. On a GPU they are taken with CUDA events.
- ``build_s``: pools, heads and KD method; ``backbones_s``: the backbones with random weights.
- ``peak_rss_mb``: most resident memory of the process, and ``peak_device_mb`` on a GPU, up to the last timing.
- ``gemm_gflops``: a large matrix product of the same precision, the median of one before each repeat: a machine
  that others share slows both down alike.
- ``flops``: matrix arithmetic of each operation (2 per multiply-add, nothing computed twice), and ``mfu``: its
  rate as a share of ``gemm_gflops``.
- ``latency_ms``: prediction for a single image by teacher and student, each with its query.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from learners.assemble import REDUCED, compiled, set_precision
from learners.prompt import PromptLearner
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dataloaders.tasks import ClassRange
from learners.build import build_learner
from learners.distillers import DISTILLERS
from learners.distillers.base import DistillSettings
from learners.optim import OptimSettings
from learners.steps import make_query
from models.backbones import check_pair, load_backbone
from models.prompts import PROMPTS
from utils.logging import environment, peak_memory_mb
from utils.parallel import SingleDevice, choose_device

PRECISIONS = ("fp32", "tf32", *REDUCED)
GEMM_SIZE = {"cpu": 2048, "cuda": 8192}
Operations = dict[str, Callable[[], Any]]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmark step", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--learner_name", choices=list(PROMPTS), default="CODAPrompt")
    add("--prompt_param", type=float, nargs="+", help="default: the paper's")
    add("--KD_method", choices=list(DISTILLERS), default="KD_Token")
    add("--kd_prompt_param", type=int, nargs=2, default=(12, 6))
    add("--t_model", default="vit_base_patch16_224")
    add("--s_model", default="vit_small_patch16_224")
    add("--batch_size", type=int, default=8)
    add("--num_classes", type=int, default=100)
    add("--num_tasks", type=int, default=10)
    add("--task", type=int, default=1, help="task that is learned, from 1: pools may grow with it")
    add("--repeats", type=int, default=5)
    add("--precision", choices=PRECISIONS, default="fp32")
    add("--compile", action="store_true")
    add("--accumulate", type=int, default=1)
    add("--gpuid", type=int, help="-1 for the CPU; default: GPU 0 if there is one")
    add("--threads", type=int, help="of the CPU; default: torch's")
    add("--profile", action="store_true", help="add the operators that take most of each operation's time")
    add("--json", action="store_true", help="print one JSON object instead of lines")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    set_precision(options.precision)
    device = choose_device(None, None if options.gpuid is None else (options.gpuid,))
    result = measure(options, device)
    if options.json:
        sys.stdout.write(json.dumps(result) + "\n")
    else:
        sys.stdout.writelines(f"{key}: {json.dumps(value)}\n" for key, value in result.items())
    return 0


def measure(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Everything that is printed."""
    learner, seconds = build(options, device)
    batch = random_batch(options, learner, device)
    profiles = {}
    product = large_product(device, REDUCED.get(options.precision, torch.float32))
    products: list[float] = []
    for name, operation in make_operations(learner, batch).items():
        between = lambda: products.append(seconds_of(product, device))  # noqa: E731
        seconds[f"{name}_s"] = median_seconds(operation, device, options.repeats, between)
        if options.profile:
            profiles[name] = profile(operation, device)
    if device.type == "cuda":  # the operations' own peak, without the large product's matrices
        del product
        torch.cuda.reset_peak_memory_stats(device)
        for operation in make_operations(learner, batch).values():
            operation()
    memory = peak_memory_mb()
    latency = latencies(learner, batch[0][:1], device, options.repeats)
    rate = 2 * gemm_size(device) ** 3 / statistics.median(products)
    learner.compile_step = lambda step: step  # what is compiled cannot be counted
    flops = {name: count_flops(run) for name, run in make_operations(learner, batch).items()}
    result = {
        **seconds,
        "peak_rss_mb": memory["cpu"],
        **({"peak_device_mb": memory[str(device)]} if device.type == "cuda" else {}),
        "gemm_gflops": rate / 1e9,
        "flops": flops,
        "mfu": {name: count / seconds[f"{name}_s"] / rate for name, count in flops.items()},
        "latency_ms": latency,
        "options": vars(options),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        **environment(),
    }
    return result | ({"profile": profiles} if profiles else {})


def build(options: argparse.Namespace, device: torch.device) -> tuple[PromptLearner, dict[str, float]]:
    """The learner, ready for the task, and the seconds that its parts took."""
    torch.manual_seed(0)
    start = time.perf_counter()
    names = {"teacher": options.t_model, "student": options.s_model}
    vits = {role: load_backbone(name, pretrained=False).vit for role, name in names.items()}
    check_pair(vits["teacher"], vits["student"])
    if options.precision in REDUCED:
        vits = {role: vit.reduce_precision(REDUCED[options.precision]) for role, vit in vits.items()}
    vits = {role: vit.to(device) for role, vit in vits.items()}
    synchronize(device)  # the device starts and takes the weights before the clock of the rest
    built = time.perf_counter()
    layers, length = options.kd_prompt_param
    learner = build_learner(
        learner_name=options.learner_name,
        prompt_param=options.prompt_param or PROMPTS[options.learner_name].paper,
        kd_method=options.KD_method,
        distill=DistillSettings(0.5, 2.0, min(layers, vits["student"].depth), length),
        teacher_vit=vits["teacher"],
        student_vit=vits["student"],
        num_classes=options.num_classes,
        num_tasks=options.num_tasks,
        optim=OptimSettings(),
        aux_loss_scale=1.0,
        seed=0,
        parallel=SingleDevice(device),
        accumulate=options.accumulate,
        compile_step=compiled if options.compile else None,
    )
    synchronize(device)
    seconds = {"build_s": time.perf_counter() - built, "backbones_s": built - start}
    for task in range(1, options.task):
        learner.begin_task(task)
    return learner, seconds


def random_batch(
    options: argparse.Namespace, learner: PromptLearner, device: torch.device
) -> tuple[Tensor, Tensor, ClassRange]:
    """Images and labels on the device, and the classes of the task."""
    per_task = options.num_classes // options.num_tasks
    classes = ClassRange((options.task - 1) * per_task, options.task * per_task)
    size = learner.query_vit.image_size
    images = torch.rand(options.batch_size, 3, size, size)
    targets = torch.randint(classes.start, classes.stop, (options.batch_size,))
    return images.to(device), targets.to(device), classes


def make_operations(learner: PromptLearner, batch: tuple[Tensor, Tensor, ClassRange]) -> Operations:
    """One step of each phase of the learner, and the evaluation of the batch."""
    images, targets, classes = batch
    operations: Operations = {}

    def training(role: str) -> Callable[[], Any]:
        phase = None

        def step() -> Any:
            nonlocal phase
            if phase is None:  # begun when its turn comes: a phase decides what has gradients
                phase = learner.begin_phase(role, classes)
            return phase.train_step(images, targets)

        return step

    for role in learner.phases:
        operations[role] = training(role)

    evaluator = None

    @torch.inference_mode()
    def evaluate() -> Any:
        nonlocal evaluator
        if evaluator is None:  # what is compiled has no truth value
            evaluator = learner.evaluator()
        return evaluator(images, targets, classes.stop)

    return operations | {"evaluate": evaluate}


def median_seconds(
    operation: Callable[[], Any],
    device: torch.device,
    repeats: int,
    before_each: Callable[[], Any] = lambda: None,
) -> float:
    """Of ``repeats`` runs after a warm-up."""
    for _ in range(3 if device.type == "cuda" else 1):
        operation()
    seconds = []
    for _ in range(repeats):
        before_each()
        seconds.append(seconds_of(operation, device))
    return statistics.median(seconds)


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(operation: Callable[[], Any], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        operation()
        return time.perf_counter() - start
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start.record()
    operation()
    stop.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(stop) / 1000


def latencies(learner: PromptLearner, image: Tensor, device: torch.device, repeats: int) -> dict[str, float]:
    """Milliseconds of the prediction for one image, per model."""

    @torch.inference_mode()
    def teacher() -> Tensor:
        query, _ = make_query(learner.query_vit, image)
        return learner.teacher(learner.teacher.vit.embed(image), query).logits

    @torch.inference_mode()
    def student() -> Tensor:
        query, tokens = make_query(learner.query_vit, image)
        return learner.distiller.predict(learner.student(tokens, query, learner.distiller.student_inputs()))

    learner.eval_step()  # puts all into evaluation mode
    predict = {"teacher": teacher, "student": student}
    return {role: 1000 * median_seconds(predict[role], device, 3 * repeats) for role in learner.phases}


def gemm_size(device: torch.device) -> int:
    """Rows and columns of the large product's matrices."""
    return GEMM_SIZE.get(device.type, GEMM_SIZE["cpu"])


def large_product(device: torch.device, dtype: torch.dtype) -> Callable[[], Tensor]:
    """A product of large square matrices, warmed up."""
    size = gemm_size(device)
    left, right = (torch.rand(size, size, device=device).to(dtype) for _ in range(2))
    product = lambda: left @ right  # noqa: E731
    product()
    return product


class NoModules(contextlib.nullcontext):
    """Which module computes what is of no interest here, and following it fails in inference mode."""

    parents = ("Global",)


def count_flops(operation: Callable[[], Any]) -> int:
    """FLOPs of all matrix products, those of attention among them (hence its plain kernel)."""
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = NoModules()
    with sdpa_kernel(SDPBackend.MATH), counter:
        operation()
    return counter.get_total_flops()


def profile(operation: Callable[[], Any], device: torch.device, top: int = 12) -> list[dict[str, Any]]:
    """The operators that take most of the time, with their share of it."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    key = "self_cpu_time_total"
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        key = "self_device_time_total"
    with torch.profiler.profile(activities=activities) as profiler:
        operation()
    events = sorted(profiler.key_averages(), key=lambda event: getattr(event, key), reverse=True)
    total = sum(getattr(event, key) for event in events) or 1
    return [
        {
            "operator": event.key,
            "calls": event.count,
            "ms": round(getattr(event, key) / 1000, 3),
            "share": round(getattr(event, key) / total, 4),
        }
        for event in events[:top]
    ]


if __name__ == "__main__":
    sys.exit(main())
