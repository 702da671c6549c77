"""Arranges runs in the layout of the paper's table, and says everything the formats share."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from utils.logging import duration
from utils.metrics import mean_std
from utils.report.runs import TOKEN_METHOD, Column, Row, Run, Unused

METHODS = ("none", "KD", "DKD", "FitNets", "ReviewKD")
NONE = Column("none")
_TOKEN_ALONE, _KDP = Column(TOKEN_METHOD, (1, 6)), Column(TOKEN_METHOD, (12, 6))
_PAPER_COLUMNS = (*map(Column, METHODS), _TOKEN_ALONE)
_BASE_SMALL = ("vit_base_patch16_224", "vit_small_patch16_224")
_LARGE_BASE = ("vit_large_patch16_224", "vit_base_patch16_224")
_PAPER_ROWS = """
CIFAR100   base  CODAPrompt 82.18/6.48 82.39/7.33  82.27/7.81 81.83/8.83 82.20/7.54 83.72/6.40
CIFAR100   base  DualPrompt 79.85/6.12 80.16/5.76  80.44/6.96 80.70/5.73 80.33/5.86 81.32/5.67
CIFAR100   base  L2P        77.71/7.12 77.92/8.30  78.21/9.13 79.56/5.89 78.50/8.04 79.78/7.07
CIFAR100   large CODAPrompt 86.16/5.63 87.41/5.45  85.42/6.55 85.95/6.56 86.21/5.64 88.10/5.39
CIFAR100   large DualPrompt 84.66/5.91 83.40/8.23  84.93/4.95 83.12/8.33 84.11/5.19 85.32/5.64
CIFAR100   large L2P        83.02/6.06 80.96/10.17 83.29/4.99 83.60/5.21 83.12/7.97 85.20/4.58
ImageNet_R base  CODAPrompt 67.44/8.52 69.23/8.57  68.92/8.39 69.87/7.38 70.19/7.68 70.94/6.17
ImageNet_R base  DualPrompt 64.27/5.93 65.68/7.26  65.44/7.27 66.20/5.93 65.69/6.56 66.81/4.55
ImageNet_R base  L2P        61.95/6.52 63.36/6.74  62.91/6.55 64.29/6.37 63.64/6.36 65.09/5.37
ImageNet_R large CODAPrompt 75.78/5.70 77.51/3.44  76.70/4.84 74.55/6.81 75.72/4.14 77.28/4.63
ImageNet_R large DualPrompt 72.44/3.80 73.90/3.31  75.24/4.15 71.23/5.71 72.19/5.72 73.63/3.50
ImageNet_R large L2P        71.59/5.65 74.12/4.60  74.58/4.69 70.39/5.84 72.17/6.11 71.89/3.42
"""

ABOUT = (
    "Student: final average accuracy (%) / forgetting (points; the original's: summed over all T tasks, "
    "divided by T). Mean ± sample standard deviation over n seeds of complete runs. Difference: ours "
    "minus the paper's, for runs with its 10 tasks and its split, whatever their other settings. KD_Token "
    "is followed by its --kd_prompt_param. The last column is the teacher's accuracy (%). Bold: the best "
    "mean of a row, among the cells with the most seeds."
)
ABOUT_GAINS = (
    "Student's accuracy minus that of the same student without distillation and with the same seed, in "
    "points: mean ± sample standard deviation of the n paired differences."
)
PAPER_SOURCE = (
    "Source of the paper's numbers: average accuracy / forgetting of the student after 10 tasks, from the "
    "project page of the authors of Continual Distillation Learning (arXiv 2407.13911). Their column "
    "KD-Token is the token alone, --kd_prompt_param 1 6 here; KDP itself is 12 6, for which a summary of "
    "the paper gives 84.31 % (CIFAR-100, ViT-Base to ViT-Small, CODAPrompt)."
)
RUN_HEAD = ("folder", "data", "teacher → student", "learner", "KD method", "seed", "tasks", "accuracy (%)",
            "forgetting", "teacher (%)", "time", "state")  # fmt: skip

PaperNumbers = tuple[float, "float | None"]  # average accuracy, forgetting (%)
Gain = tuple[float, "float | None", int]  # mean, standard deviation, number of seeds


PAPER_SHORT = "paper: the project page of arXiv 2407.13911"


def paper_numbers() -> dict[tuple[str, str, str, str], dict[Column, PaperNumbers]]:
    """The paper's table: (data set, teacher, student, learner) -> column -> accuracy and forgetting."""
    table: dict[tuple[str, str, str, str], dict[Column, PaperNumbers]] = {}
    for line in _PAPER_ROWS.strip().split("\n"):
        dataset, teacher, learner, *cells = line.split()
        teacher, student = _BASE_SMALL if teacher == "base" else _LARGE_BASE
        numbers = (tuple(map(float, cell.split("/"))) for cell in cells)
        table[dataset, teacher, student, learner] = dict(zip(_PAPER_COLUMNS, numbers, strict=True))
    teacher, student = _BASE_SMALL
    table["CIFAR100", teacher, student, "CODAPrompt"][_KDP] = (84.31, None)
    return table


@dataclass
class Cell:
    """All runs of one row and column, and what the paper has there."""

    runs: list[Run] = field(default_factory=list)
    unfinished: list[Run] = field(default_factory=list)
    paper: PaperNumbers | None = None

    def measure(self, name: str, role: str = "student") -> tuple[float, float | None] | None:
        """Mean and standard deviation of a measure over the complete runs; None without any."""
        values = [getattr(run, role)[name] for run in self.runs if getattr(run, role) is not None]
        return mean_std(values) if values else None

    def difference(self) -> PaperNumbers | None:
        """Ours minus the paper's, accuracy and forgetting; None where they cannot be compared."""
        if not self.runs or self.paper is None or not all(run.like_the_paper for run in self.runs):
            return None
        accuracy, forgetting = self.measure("final_average_accuracy"), self.measure("forgetting")
        theirs = self.paper[1]
        return accuracy[0] - self.paper[0], None if theirs is None else forgetting[0] - theirs

    def gain(self, other: Cell) -> Gain | None:
        """Accuracy minus that of ``other`` for the same seed; None without a common seed."""
        theirs = {run.seed: run.student["final_average_accuracy"] for run in other.runs}
        ours = {run.seed: run.student["final_average_accuracy"] for run in self.runs}
        values = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
        return (*mean_std(values), len(values)) if values else None

    def marks(self) -> list[str]:
        """What to say of runs that are not counted."""
        return [f"seed {run.seed} unfinished: {run.tasks_done} of {run.num_tasks} tasks"
                for run in self.unfinished]


@dataclass
class Report:
    """Everything that the four files show."""

    cells: dict[Row, dict[Column, Cell]]
    labels: dict[Row, str]  # what tells rows of one key apart
    runs: list[Run]
    unused: list[Unused]

    def datasets(self) -> list[str]:
        return list(dict.fromkeys(row.dataset for row in self.cells))

    def sources(self) -> list[str]:
        """Where the numbers that are not ours come from."""
        return [PAPER_SOURCE] if any(c.paper for row in self.cells.values() for c in row.values()) else []

    def rows(self, dataset: str) -> list[Row]:
        return [row for row in self.cells if row.dataset == dataset]

    def columns(self, dataset: str) -> list[Column]:
        """The paper's columns, then what else there is."""
        found = {column for row in self.rows(dataset) for column in self.cells[row]}
        return sorted({*found, *map(Column, METHODS)}, key=column_order)

    def gains(self, dataset: str) -> tuple[list[Column], dict[Row, dict[Column, Gain]]]:
        """What each KD method adds, for the rows and columns that can be compared with no distillation."""
        table = {}
        for row in self.rows(dataset):
            none = self.cells[row].get(NONE, Cell())
            gains = {column: cell.gain(none) for column, cell in self.cells[row].items() if column != NONE}
            gains = {column: gain for column, gain in gains.items() if gain is not None}
            if gains:
                table[row] = gains
        return sorted({column for gains in table.values() for column in gains}, key=column_order), table


def build_report(runs: Sequence[Run], unused: Sequence[Unused]) -> Report:
    """Arrange the runs in the paper's layout, with all its rows for each of its data sets that has runs."""
    paper = paper_numbers()
    cells: dict[Row, dict[Column, Cell]] = {}
    for run in sorted(runs, key=lambda run: run.seed):
        cell = cells.setdefault(run.row, {}).setdefault(run.column, Cell())
        (cell.runs if run.complete else cell.unfinished).append(run)
    datasets, keys = {row.dataset for row in cells}, {row.key for row in cells}
    for key in paper:
        if key[0] in datasets and key not in keys:
            cells[Row(*key, "{}")] = {}
    for row, columns in cells.items():
        for column, numbers in paper.get(row.key, {}).items():
            columns.setdefault(column, Cell()).paper = numbers
    order = list(paper)
    rows = sorted(cells, key=lambda row: (order.index(row.key) if row.key in order else len(order), row))
    return Report({row: cells[row] for row in rows}, _row_labels(rows), list(runs), list(unused))


def _row_labels(rows: Iterable[Row]) -> dict[Row, str]:
    """For rows that differ only in further settings: those settings, as ``batch_size 16, lr 0.01``."""
    groups: dict[tuple[str, str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault(row.key, []).append(row)
    labels = {}
    for group in groups.values():
        settings = {row: json.loads(row.settings) for row in group}
        keys = sorted({key for values in settings.values() for key in values})
        differing = [key for key in keys if len({json.dumps(v.get(key)) for v in settings.values()}) > 1]
        for row, values in settings.items():
            labels[row] = ", ".join(f"{key} {_setting(values.get(key))}" for key in differing)
    return labels


def _setting(value: Any) -> str:
    text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def column_order(column: Column) -> tuple[int, str, tuple[int, ...]]:
    """Sorts columns as the paper does; methods that it does not have come last, by name."""
    known = (*METHODS, TOKEN_METHOD)
    return known.index(column.method) if column.method in known else len(known), column.method, column.param


def best_column(columns: Mapping[Column, Cell]) -> Column | None:
    """The column with our highest mean accuracy, where there are at least two to choose from.

    Only columns with the most seeds take part: a lucky single seed is no better method.
    """
    seeds = max((len(cell.runs) for cell in columns.values()), default=0)
    measured = {column: cell.measure("final_average_accuracy") for column, cell in columns.items()
                if len(cell.runs) == seeds}
    means = {column: value[0] for column, value in measured.items() if value is not None}
    return max(means, key=means.__getitem__) if len(means) > 1 else None


# ------------------------------------------------------------------------------------- text, not yet escaped


def number(value: float) -> str:
    """Two decimals, with a true minus sign and no −0.00."""
    return f"{round(value, 2) + 0.0:.2f}".replace("-", "−")


def signed(value: float) -> str:
    return f"{round(value, 2) + 0.0:+.2f}".replace("-", "−")


def spread(measured: tuple[float, float | None] | None) -> str:
    """``82.39 ± 0.31``, without the deviation for one seed; empty without any."""
    if measured is None:
        return ""
    mean, std = measured
    return number(mean) if std is None else f"{number(mean)} ± {std:.2f}"


def ours_text(cell: Cell) -> tuple[str, str]:
    """Accuracy and forgetting; empty without a complete run."""
    return spread(cell.measure("final_average_accuracy")), spread(cell.measure("forgetting"))


def paper_text(cell: Cell) -> str:
    return "" if cell.paper is None else " / ".join("–" if v is None else number(v) for v in cell.paper)


def difference_text(cell: Cell) -> str:
    difference = cell.difference()
    return "" if difference is None else " / ".join("–" if v is None else signed(v) for v in difference)


def gain_text(gain: Gain | None) -> str:
    if gain is None:
        return ""
    mean, std, seeds = gain
    return f"{signed(mean)}{'' if std is None else f' ± {std:.2f}'} (n = {seeds})"


def teacher_text(columns: Mapping[Column, Cell]) -> str:
    """The teacher's accuracy over seeds; per seed the mean over KD methods, which all train it alike."""
    by_seed: dict[int, list[float]] = {}
    for cell in columns.values():
        for run in cell.runs:
            if run.teacher is not None:
                by_seed.setdefault(run.seed, []).append(run.teacher["final_average_accuracy"])
    return spread(mean_std([mean_std(values)[0] for values in by_seed.values()])) if by_seed else ""


def name_texts(row: Row, label: str) -> list[str]:
    """The learner, and below it what tells the row from others of the same learner."""
    return [row.learner, label] if label else [row.learner]


def models_text(row: Row) -> str:
    return " → ".join(name.removesuffix("_patch16_224") for name in (row.teacher, row.student))


def run_texts(run: Run) -> list[str]:
    """The cells of a run under :data:`RUN_HEAD`."""
    return [
        run.folder, run.row.dataset, models_text(run.row), run.row.learner, run.column.label, str(run.seed),
        f"{run.tasks_done} of {run.num_tasks}", number(run.student["final_average_accuracy"]),
        number(run.student["forgetting"]),
        "" if run.teacher is None else number(run.teacher["final_average_accuracy"]),
        "" if run.seconds is None else duration(run.seconds) + (" (student only)" if run.student_only else ""),
        "complete" if run.complete else "unfinished",
    ]  # fmt: skip


def clean(text: str) -> str:
    """``text`` without what no file format can hold: control characters and lone surrogates."""
    return re.sub("[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", "\ufffd", text)
