"""How the cost of a step grows with the number of tasks and the size of CODA-Prompt's pool.

    python -m tests.benchmark growth --t_model vit_small_patch16_224 --s_model vit_tiny_patch16_224

One JSON object per line: number of tasks, pool size, the task that is learned, components in use, seconds and GFLOP
of the three operations of ``benchmark step``, seconds of an evaluation after that task (one batch of each task so
far), and the most memory so far. Each line of CASES is a process of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any

from tests import benchmark_step
from tests.benchmark_step import count_flops, make_operations, median_seconds
from utils.logging import peak_memory_mb
from utils.parallel import choose_device

CASES = ((10, 100), (20, 100), (10, 400), (20, 400))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmark growth", description=__doc__.split("\n")[0])
    parser.add_argument("--t_model", default="vit_base_patch16_224")
    parser.add_argument("--s_model", default="vit_small_patch16_224")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--gpuid", type=int, help="-1 for the CPU; default: GPU 0 if there is one")
    parser.add_argument("--case", type=int, nargs=2, metavar=("TASKS", "POOL"), help="this one only")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    options = parse(argv)
    if options.case:
        for row in measure(options, *options.case):
            sys.stdout.write(json.dumps(row) + "\n")
            sys.stdout.flush()
        return 0
    for case in CASES:
        command = [sys.executable, "-m", "tests.benchmark", "growth", *argv, "--case", *map(str, case)]
        subprocess.run(command, check=True)
    return 0


def measure(options: argparse.Namespace, tasks: int, pool: int) -> list[dict[str, Any]]:
    """Rows for the first, the middle and the last task of a stream."""
    device = choose_device(None, None if options.gpuid is None else (options.gpuid,))
    names = ("t_model", "s_model", "batch_size")
    arguments = [text for name in names for text in (f"--{name}", str(getattr(options, name)))]
    arguments += ["--num_tasks", str(tasks), "--prompt_param", str(pool), "8", "0"]
    learner, _ = benchmark_step.build(benchmark_step.parse(arguments), device)
    rows, task = [], 1
    for stop in (1, tasks // 2, tasks):
        while task < stop:
            learner.begin_task(task)  # counted from 0: the next one
            task += 1
        step_options = benchmark_step.parse([*arguments, "--task", str(task)])
        batch = benchmark_step.random_batch(step_options, learner, device)
        operations = make_operations(learner, batch)
        seconds = {name: median_seconds(run, device, options.repeats) for name, run in operations.items()}
        flops = {name: count_flops(run) for name, run in make_operations(learner, batch).items()}
        rows.append(
            {"tasks": tasks, "pool": pool, "task": task, "components": pool // tasks * task}
            | {f"{name}_s": round(value, 4) for name, value in seconds.items()}
            # one batch of each task so far: what an evaluation after the task runs, per batch of a test set
            | {"evaluation_after_task_s": round(task * seconds["evaluate"], 4)}
            | {f"{name}_gflop": round(count / 1e9, 2) for name, count in flops.items()}
            | {"peak_mb": peak_memory_mb()}
        )
    return rows
