"""Measures of continual learning, and the result files made from them.

``a[i][j]`` is the accuracy (%) on task j after learning task i (both from 0; top 1 over all classes seen
so far), so row i has i + 1 values. All measures are also defined while a run is under way: after n of its T
tasks they are the measures of a run of n tasks.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

FORMAT = 1

# Measure names as they stand in metrics.json, with the words used for them in tables.
MEASURES: dict[str, str] = {
    "final_average_accuracy": "Final average accuracy",
    "forgetting": "Forgetting",
    "average_incremental_accuracy": "Average incremental accuracy",
    "forgetting_max": "Forgetting (from best)",
    "backward_transfer": "Backward transfer",
}

# Key in metrics.json -> key of the settings (the command line's names) that it repeats for quick reading.
_FROM_SETTINGS = {
    "dataset": "dataset",
    "learner_name": "learner_name",
    "KD_method": "KD_method",
    "t_model": "t_model",
    "s_model": "s_model",
    "seed": "random_s",
}


class AccuracyMatrix:
    """The lower triangle a[i][j] of one model and every measure made from it.

    Args:
        rows: rows learned so far, row i with i + 1 accuracies in %.

    Raises:
        ValueError: a row has the wrong length or a value is no percentage.
    """

    def __init__(self, rows: Iterable[Sequence[float]] = ()) -> None:
        self.rows: list[list[float]] = []
        for task, row in enumerate(rows):
            self.set_row(task, row)

    def __len__(self) -> int:
        """The number of tasks done."""
        return len(self.rows)

    def set_row(self, task: int, accuracies: Sequence[float]) -> None:
        """Enter the accuracies (%) on tasks 0 … ``task`` measured after learning ``task``.

        A row that is already there is replaced (a task repeated after an interruption).

        Raises:
            ValueError: a row is skipped, the number of values is not ``task`` + 1, or a value is outside
                0 … 100.
        """
        if not 0 <= task <= len(self.rows):
            raise ValueError(f"accuracies of task {task} cannot follow {len(self.rows)} tasks")
        if len(accuracies) != task + 1:
            raise ValueError(f"task {task} needs {task + 1} accuracies (one per task), not {len(accuracies)}")
        row = [float(value) for value in accuracies]
        for value in row:
            if not 0.0 <= value <= 100.0:  # also refuses NaN
                raise ValueError(f"accuracy {value} after task {task} is not a percentage between 0 and 100")
        self.rows[task:task + 1] = [row]

    @property
    def average_accuracy(self) -> list[float]:
        """acc_i = mean over j ≤ i of a[i][j], one value per task done, in %."""
        return [statistics.fmean(row) for row in self.rows]

    @property
    def final_average_accuracy(self) -> float:
        """acc_i after the last task done, in %."""
        return statistics.fmean(self._last())

    @property
    def average_incremental_accuracy(self) -> float:
        """Mean of acc_i over the tasks done, in % (Rebuffi et al. 2017, iCaRL)."""
        self._last()
        return statistics.fmean(self.average_accuracy)

    @property
    def forgetting(self) -> float:
        """The original's forgetting, Σ_j (a[j][j] − a[T][j]) / T, in points: the last task's 0 counts."""
        last = self._last()
        return statistics.fmean(self.rows[j][j] - last[j] for j in range(len(last)))

    @property
    def forgetting_max(self) -> float:
        """The usual forgetting, in points (Chaudhry et al. 2018, eq. 3).

        The best accuracy that a task ever had before the last one was learned, minus its accuracy now,
        averaged over all tasks but the last. 0.0 after a single task: nothing has been left behind yet.
        """
        last = self._last()
        past = range(len(last) - 1)
        drops = [max(self.rows[i][j] for i in range(j, len(last) - 1)) - last[j] for j in past]
        return statistics.fmean(drops) if drops else 0.0

    @property
    def backward_transfer(self) -> float:
        """Mean over all tasks but the last of a[T][j] − a[j][j], in points (Lopez-Paz and Ranzato 2017).

        0.0 after a single task, as for :attr:`forgetting_max`.
        """
        last = self._last()
        gains = [last[j] - self.rows[j][j] for j in range(len(last) - 1)]
        return statistics.fmean(gains) if gains else 0.0

    def to_dict(self) -> dict[str, Any]:
        """The matrix and all measures under their names in metrics.json."""
        measures = {name: getattr(self, name) for name in MEASURES}
        rows = [list(row) for row in self.rows]
        return {"accuracy_matrix": rows, "average_accuracy": self.average_accuracy, **measures}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AccuracyMatrix:
        """The matrix of :meth:`to_dict`; the measures are computed anew, never trusted.

        Raises:
            ValueError: ``values`` holds no well-formed matrix.
        """
        rows = values.get("accuracy_matrix") if isinstance(values, Mapping) else None
        if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
            raise ValueError("no accuracy_matrix, a list of rows")
        if not all(isinstance(v, int | float) and not isinstance(v, bool) for row in rows for v in row):
            raise ValueError("accuracy_matrix holds something that is no number")
        return cls(rows)

    def _last(self) -> list[float]:
        if not self.rows:
            raise ValueError("no task has been evaluated yet, so there is no measure")
        return self.rows[-1]


def build_metrics(
    *,
    settings: Mapping[str, Any],
    settings_hash: str,
    num_tasks: int,
    classes: Sequence[Sequence[int]],
    teacher: AccuracyMatrix | None,
    student: AccuracyMatrix,
    parameters: Mapping[str, Any],
    losses: Mapping[str, Any],
    prompt_usage: Mapping[str, Any],
    data: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The content of Results/metrics.json as plain data, ready for :func:`metrics_json` and the pictures.

    Args:
        settings: resolved settings under the command line's names (``Config.to_yaml_dict()``).
        settings_hash: hash of what decides the result.
        num_tasks: tasks planned to run, T or ``max_task``.
        classes: (start, stop) of each of these tasks.
        teacher: accuracies of the teacher, None without one.
        student: accuracies of the student.
        parameters: ``{"teacher": {"total": int, "trained": int} | None, "student": {...}}``.
        losses: ``{"teacher": [[{term: mean, …} per epoch] per task], "student": …}``; a role may be missing.
        prompt_usage: ``{"teacher": [{layer: [share or weight per entry]} per task], "student": …}``, too.
        data: what tells the data set from others of the same name, alike for all seeds.

    Raises:
        ValueError: a setting is missing, or the parts do not describe the same number of tasks.
    """
    missing = [key for key in _FROM_SETTINGS.values() if key not in settings]
    if missing:
        raise ValueError(f"the settings lack {', '.join(missing)}")
    done = len(student)
    if not 1 <= done <= num_tasks:
        raise ValueError(f"{done} tasks have results, but {num_tasks} were to run")
    if len(classes) != num_tasks:
        raise ValueError(f"class ranges of {len(classes)} tasks for {num_tasks} tasks")
    if teacher is not None and len(teacher) != done:
        raise ValueError(f"the teacher has results of {len(teacher)} tasks, the student of {done}")
    for what, per_role in (("losses", losses), ("prompt usage", prompt_usage)):
        for role, per_task in per_role.items():
            if per_task and len(per_task) != done:
                raise ValueError(f"{what} of the {role}: {len(per_task)} tasks instead of {done}")
    metrics = {
        "format": FORMAT,
        "complete": done == num_tasks,
        **{key: settings[source] for key, source in _FROM_SETTINGS.items()},
        "settings": dict(settings),
        "settings_hash": settings_hash,
        "num_tasks": num_tasks,
        "tasks_done": done,
        "classes": [list(pair) for pair in classes],
        "data": None if data is None else dict(data),
        "teacher": None if teacher is None else teacher.to_dict(),
        "student": student.to_dict(),
        "parameters": parameters,
        "losses": losses,
        "prompt_usage": prompt_usage,
    }
    return _plain(metrics)


def metrics_json(metrics: Mapping[str, Any]) -> str:
    """The text of Results/metrics.json: equal results give equal bytes (sorted keys, fixed float digits)."""
    return json.dumps(_plain(metrics), sort_keys=True, indent=1, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    """Plain JSON data: numpy numbers and tuples unpacked, floats to 10 digits, non-finite numbers as null.

    A diverged loss is the case for null: JSON has no NaN, and a run's accuracies must not be lost to it.
    """
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | int | str):
        return value
    if hasattr(value, "tolist"):  # numpy scalars and arrays, without importing numpy here
        return _plain(value.tolist())
    if isinstance(value, float):
        return float(f"{value:.10g}") + 0.0 if math.isfinite(value) else None  # + 0.0: no -0.0
    raise ValueError(f"cannot write a {type(value).__name__} into metrics.json: {value!r}")


def acc_csv(values: Sequence[float]) -> str:
    """The text of Results/acc.csv and acc_s.csv: acc_i of one task a line, two decimals, as the original."""
    return "".join(f"{value:.2f}\n" for value in values)


def summary_lines(student: Mapping[str, Any]) -> list[str]:
    """The three lines with which the original's log ends, from the student's part of metrics.json."""
    return [
        "===Summary of student experiment===",
        f"Acc | mean: {_fixed(student['final_average_accuracy'])}",
        f"Forgetting: {_fixed(student['forgetting'])}",
    ]


def summary_table(teacher: Mapping[str, Any] | None, student: Mapping[str, Any]) -> str:
    """The short table printed at the end of a run: acc_i after each task, then the measures."""
    roles = ["student"] if teacher is None else ["teacher", "student"]
    models = [student] if teacher is None else [teacher, student]
    rows = [("", *roles)]
    for task in range(len(student["average_accuracy"])):
        accuracies = (_fixed(model["average_accuracy"][task]) for model in models)
        rows.append((f"Accuracy after task {task + 1} (%)", *accuracies))
    for name, words in MEASURES.items():
        unit = "%" if name.endswith("accuracy") else "points"
        rows.append((f"{words} ({unit})", *(_fixed(m[name]) for m in models)))
    width = max(len(row[0]) for row in rows)
    lines = [f"{row[0]:<{width}}" + "".join(f"{cell:>9}" for cell in row[1:]) for row in rows]
    rule = "-" * len(lines[0])
    return "\n".join([lines[0], rule, *lines[1:-len(MEASURES)], rule, *lines[-len(MEASURES):]])


def mean_std(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (n − 1) over seeds; the deviation of a single value is None.

    Raises:
        ValueError: no value.
    """
    if not values:
        raise ValueError("no value to take the mean of")
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def aggregate(models: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Every measure over several seeds.

    Args:
        models: the teacher's or the student's part of metrics.json, one per seed.

    Returns:
        measure -> ``{"mean": float, "std": float | None, "n": int, "values": [...]}``.
    """
    summary = {}
    for name in MEASURES:
        values = [model[name] for model in models]
        mean, std = mean_std(values)
        summary[name] = {"mean": mean, "std": std, "n": len(values), "values": values}
    return summary


def _fixed(value: float) -> str:
    return f"{round(value, 2) + 0.0:.2f}"  # + 0.0: forgetting of -0.00 reads as 0.00
