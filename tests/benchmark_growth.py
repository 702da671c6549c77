"""How the cost of a step grows with the number of tasks and the size of CODA-Prompt's pool.

    python -m tests.benchmark growth --t_model vit_small_patch16_224 --s_model vit_tiny_patch16_224

One JSON object per line: tasks, pool size, the task that is learned, components in use, seconds and GFLOP of the
operations of ``benchmark step``, seconds of an evaluation of a batch of each task so far, and the most memory so far.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from tests.benchmark_step import measure, parser, step_config

CASES = ((10, 100), (20, 100), (10, 400), (20, 400))  # tasks, pool size


def main(argv: Sequence[str]) -> None:
    options, rest = parser("growth", __doc__.split("\n")[0]).parse_known_args(argv)
    for tasks, pool in CASES:
        config = step_config(tasks, [*rest, "--learner_name", "CODAPrompt", "--prompt_param", str(pool), "8", "0"])
        for task in (1, tasks // 2, tasks):
            result = measure(config, tasks, task, options.repeats)
            row = {"tasks": tasks, "pool": pool, "task": task, "components": pool // tasks * task}
            for name, flops in result["flops"].items():
                row |= {f"{name}_s": round(result[f"{name}_s"], 4), f"{name}_gflop": round(flops / 1e9, 2)}
            row["evaluation_after_task_s"] = round(task * result["evaluate_s"], 4)
            print(json.dumps(row | {"peak_mb": result["peak_rss_mb"]}), flush=True)
