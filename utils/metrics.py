"""Measures of continual learning, and the result files made from them.

``a[i][j]`` is the accuracy (%) on task j after learning task i (both from 0; top 1 over all classes seen so far), so
row i has i + 1 values. All measures are also defined during a run: after n of its T tasks they are the measures of a
run of n tasks.
"""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

FORMAT = 1  # of metrics.json

# Name of a measure in metrics.json -> name in tables.
MEASURES = {
    "final_average_accuracy": "Final average accuracy",
    "forgetting": "Forgetting",
    "average_incremental_accuracy": "Average incremental accuracy",
    "forgetting_max": "Forgetting (from best)",
    "backward_transfer": "Backward transfer",
}


def measure(rows: Sequence[Sequence[float]]) -> dict[str, Any]:
    """The accuracy matrix of one model, of at least one row, and its measures, under their names in metrics.json.

    - average_accuracy: acc_i = mean over j ≤ i of a[i][j], one value per task done, in %.
    - final_average_accuracy: acc_i after the last task done, in %.
    - average_incremental_accuracy: mean of acc_i over the tasks done, in % (Rebuffi et al. 2017, iCaRL).
    - forgetting: the original's, Σ_j (a[j][j] − a[T][j]) / T, in points: the last task's 0 counts.
    - forgetting_max: the usual one, in points (Chaudhry et al. 2018, eq. 3): the best accuracy that a task had before
      the last one was learned, minus its accuracy now, averaged over all tasks but the last; 0.0 after a single task.
    - backward_transfer: mean of a[T][j] − a[j][j] over the same tasks, in points (Lopez-Paz and Ranzato 2017), or 0.0.

    Raises ValueError for rows that do not form a triangle.
    """
    if [len(row) for row in rows] != [*range(1, len(rows) + 1)]:
        raise ValueError("the accuracy matrix is not a triangle")
    *before, last = rows
    average = [statistics.fmean(row) for row in rows]
    lost = [max(row[j] for row in before[j:]) - last[j] for j in range(len(before))]
    gained = [last[j] - row[j] for j, row in enumerate(before)]
    return {
        "accuracy_matrix": [list(row) for row in rows],
        "average_accuracy": average,
        "final_average_accuracy": average[-1],
        "average_incremental_accuracy": statistics.fmean(average),
        "forgetting": statistics.fmean(row[-1] - now for row, now in zip(rows, last, strict=True)),
        "forgetting_max": statistics.fmean(lost or [0.0]),
        "backward_transfer": statistics.fmean(gained or [0.0]),
    }


def metrics_json(metrics: Mapping[str, Any]) -> str:
    """The text of Results/metrics.json: equal results give equal bytes (sorted keys, fixed float digits)."""
    return json.dumps(_plain(metrics), sort_keys=True, indent=1, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    """The value with floats of 10 digits, without -0.0, and with null for NaN, which JSON lacks (a diverged loss)."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.10g}") + 0.0 if math.isfinite(value) else None
    return value


def acc_csv(values: Sequence[float]) -> str:
    """The text of Results/acc.csv and acc_s.csv: acc_i of one task per line, two decimals, as in the original."""
    return "".join(f"{value:.2f}\n" for value in values)


def summary_lines(student: Mapping[str, Any]) -> list[str]:
    """The three lines that end the original's log, from the student's part of metrics.json."""
    return [
        "===Summary of student experiment===",
        f"Acc | mean: {fixed(student['final_average_accuracy'])}",
        f"Forgetting: {fixed(student['forgetting'])}",
    ]


def summary_table(teacher: Mapping[str, Any] | None, student: Mapping[str, Any]) -> str:
    """The short table printed at the end of a run: acc_i after each task, then the measures."""
    models = {"student": student} if teacher is None else {"teacher": teacher, "student": student}
    rows = [("", *models)]
    for task, values in enumerate(zip(*(model["average_accuracy"] for model in models.values()), strict=True), 1):
        rows.append((f"Accuracy after task {task} (%)", *map(fixed, values)))
    for name, words in MEASURES.items():
        unit = "%" if name.endswith("accuracy") else "points"
        rows.append((f"{words} ({unit})", *(fixed(model[name]) for model in models.values())))
    width = max(len(row[0]) for row in rows)
    lines = [f"{row[0]:<{width}}" + "".join(f"{cell:>9}" for cell in row[1:]) for row in rows]
    rule = "-" * len(lines[0])
    return "\n".join([lines[0], rule, *lines[1 : -len(MEASURES)], rule, *lines[-len(MEASURES) :]])


def mean_std(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (n − 1) over seeds; the deviation of a single value is None."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def aggregate(models: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Measures of one model per seed: name -> ``{"mean": float, "std": float | None, "n": int, "values": [...]}``."""
    summary = {}
    for name in MEASURES:
        values = [model[name] for model in models]
        mean, std = mean_std(values)
        summary[name] = {"mean": mean, "std": std, "n": len(values), "values": values}
    return summary


def fixed(value: float, sign: str = "") -> str:
    """Two decimals, and with ``sign`` "+" always a sign; never -0.00."""
    return f"{round(value, 2) + 0.0:{sign}.2f}"
