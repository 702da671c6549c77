"""Time, memory and arithmetic of a training step of each role and of evaluation, with random weights.

    python -m tests.benchmark step --learner_name CODAPrompt --KD_method KD_Token --batch_size 8 --json

The result is one JSON object:

- ``teacher_s``, ``student_s``, ``evaluate_s``: median seconds of a whole step and of the evaluation of a batch;
  ``evaluate_again_s``: of an evaluation after a later task, for which the queries were kept
- ``build_s``: pools, heads and KD method; ``backbones_s``: the backbones with random weights
- ``peak_rss_mb``: most resident memory of the process, and ``peak_device_mb`` on a GPU, after two steps of each kind
- ``gemm_gflops``: a large matrix product of the same precision, the median of one before each repeat
- ``flops``: matrix arithmetic of each operation (2 per multiply-add), ``mfu``: its rate as a share of ``gemm_gflops``
- ``latency_ms``: prediction for a single image by teacher and student, each with its query
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import learners.build
from dataloaders.tasks import ClassRange, split_classes
from learners.build import REDUCED, build_learner, load_backbones, set_precision
from learners.check import load_checked_config
from learners.learner import TaskTraining, TeacherStudentLearner
from learners.speed import count_flops
from learners.steps import EvalResult, make_query
from models.backbones import load_backbone
from models.vit import run_block
from utils.config import Config
from utils.logging import environment, peak_memory_mb
from utils.parallel import build_parallel

NUM_CLASSES = 100
GEMM_SIZE = {"cpu": 2048, "cuda": 8192}
Batch = tuple[Tensor, Tensor, ClassRange]  # images [B, 3, H, W], labels [B], and the classes of their task


def parser(benchmark: str, description: str) -> argparse.ArgumentParser:
    """The options that the benchmarks of a step share, besides those of ``run.py``."""
    epilog = "All flags of run.py that concern a step are taken as well, with KD_Token and batch size 8 by default."
    prog = f"python -m tests.benchmark {benchmark}"
    parser = argparse.ArgumentParser(prog, description=description, epilog=epilog, allow_abbrev=False)
    parser.add_argument("--num_tasks", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=5)
    return parser


def step_config(num_tasks: int, argv: Sequence[str]) -> Config:
    """The configuration of a run on CIFAR-100's classes with these flags (raises ConfigError)."""
    split = str(NUM_CLASSES // num_tasks)
    defaults = ["--dataset", "CIFAR100", "--first_split_size", split, "--other_split_size", split, "--schedule", "1"]
    defaults += ["--KD_method", "KD_Token", "--batch_size", "8", "--log_dir", tempfile.gettempdir()]
    return load_checked_config([*defaults, *argv])


def build(config: Config, num_tasks: int, task: int) -> tuple[TeacherStudentLearner, Batch, dict[str, float]]:
    """The learner, ready for ``task`` (from 1), a random batch, and the seconds that the parts took."""
    torch.manual_seed(0)
    set_precision(config.precision)
    parallel = build_parallel(config.device, config.gpuid)
    start = now()
    with patch.object(learners.build, "load_backbone", partial(load_backbone, pretrained=False)):
        vits = {role: backbone.vit.to(parallel.device) for role, backbone in load_backbones(config).items()}
    built = now()
    learner = build_learner(config, vits, NUM_CLASSES, num_tasks, parallel)
    seconds = {"build_s": now() - built, "backbones_s": built - start}
    for index in range(1, task):
        # As if something was learned: untrained components are orthogonal, of which there are as many as dimensions.
        for parameter in (p for model in learner.models.values() for p in model.prompt.parameters()):
            parameter.data.add_(torch.randn_like(parameter), alpha=0.01)
        learner.begin_task(index)
    batch, size = config.data.batch_size, learner.query_vit.image_size
    classes = split_classes(NUM_CLASSES, config.data.first_split_size, config.data.other_split_size)[task - 1]
    images = torch.rand(batch, 3, size, size, device=parallel.device)
    return learner, (images, torch.randint(*classes, (batch,), device=parallel.device), classes), seconds


def make_operations(learner: TeacherStudentLearner, batch: Batch) -> dict[str, Callable[[], Any]]:
    """One step of each role of the learner, and two evaluations of the batch, to be run in this order."""
    images, targets, classes = batch

    @cache
    def training(role: str) -> TaskTraining:  # begins when its turn comes, as it decides what has gradients
        return learner.begin_training(role, classes)

    evaluator, queries = cache(learner.evaluator), []

    @torch.inference_mode()
    def evaluate(query: Tensor | None = None) -> EvalResult:
        result = evaluator()(images, targets, classes.stop, query)
        queries[:] = [result.query]
        return result

    steps = {role: lambda role=role: training(role).train_step(images, targets) for role in learner.roles}
    return steps | {"evaluate": evaluate, "evaluate_again": lambda: evaluate(*queries)}


def now() -> float:
    """Seconds of a clock, once a GPU has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds_of(operation: Callable[[], Any]) -> float:
    """Wall-clock time of one run."""
    start = now()
    operation()
    return now() - start


def latencies(learner: TeacherStudentLearner, image: Tensor, repeats: int) -> dict[str, float]:
    """Milliseconds of the prediction for one image [1, 3, H, W], per model."""

    @torch.inference_mode()
    def predict(role: str) -> Tensor:
        query, tokens = make_query(learner.query_vit, image)
        if role == "teacher":
            return learner.teacher(learner.teacher.vit.embed(image), query).logits
        return learner.distiller.predict(learner.student(tokens, query, learner.distiller.student_inputs()))

    learner.eval_step()  # puts all into evaluation mode
    seconds = {role: [seconds_of(partial(predict, role)) for _ in range(3 * repeats)] for role in learner.roles}
    return {role: 1000 * statistics.median(values) for role, values in seconds.items()}


def measure(config: Config, num_tasks: int, task: int, repeats: int) -> dict[str, Any]:
    learner, batch, seconds = build(config, num_tasks, task)
    for operation in make_operations(learner, batch).values():
        operation()
        operation()
    memory = peak_memory_mb()
    device, size = learner.parallel.device, GEMM_SIZE.get(learner.parallel.device.type, GEMM_SIZE["cpu"])
    left, right = torch.rand(2, size, size, device=device).to(REDUCED.get(config.precision, torch.float32))
    products = []
    for name, operation in make_operations(learner, batch).items():
        operation()
        timed = []
        for _ in range(repeats):
            products.append(seconds_of(lambda: left @ right))
            timed.append(seconds_of(operation))
        seconds[f"{name}_s"] = statistics.median(timed)
    rate = 2 * size**3 / statistics.median(products)
    latency = latencies(learner, batch[0][:1], repeats)
    for model in learner.models.values():
        model.vit.run_block = run_block  # what is compiled cannot be counted
    flops = {name: count_flops(operation) for name, operation in make_operations(learner, batch).items()}
    mfu = {name: count / seconds[f"{name}_s"] / rate for name, count in flops.items()}
    peaks = {"peak_rss_mb": memory.pop("cpu"), **({"peak_device_mb": max(memory.values())} if memory else {})}
    return {**seconds, **peaks, "gemm_gflops": rate / 1e9, "flops": flops, "mfu": mfu, "latency_ms": latency}


def main(argv: Sequence[str]) -> None:
    own = parser("step", __doc__.split("\n")[0])
    own.add_argument("--task", type=int, default=1, help="task that is learned, from 1: pools may grow with it")
    own.add_argument("--json", action="store_true", help="print all on one line")
    options, rest = own.parse_known_args(argv)
    config = step_config(options.num_tasks, rest)
    result = measure(config, options.num_tasks, options.task, options.repeats)
    result |= {"options": config.to_yaml_dict() | vars(options), "threads": torch.get_num_threads(), **environment()}
    print(json.dumps(result, indent=None if options.json else 2))
