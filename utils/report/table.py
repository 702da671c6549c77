"""Arranges runs in the layout of the paper's table."""

import json
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from utils.config import make_config
from utils.metrics import mean_std
from utils.report.runs import TOKEN_METHOD, Row, Run

METHODS = ("none", "KD", "DKD", "FitNets", "ReviewKD")
_PAIRS = {
    "base": ("vit_base_patch16_224", "vit_small_patch16_224"),
    "large": ("vit_large_patch16_224", "vit_base_patch16_224"),
}
# The project page of the authors as of 2026-08-17; experiments/results/README.md says what its numbers are.
_PAPER_COLUMNS = (*METHODS, f"{TOKEN_METHOD} 1 6", f"{TOKEN_METHOD} 12 6")  # the last two: DeiT and D-CDL
_PAPER = """
CIFAR100   base  CODAPrompt 82.18/6.48 83.03/7.24 82.27/7.81 81.83/8.83 82.20/7.54 83.79/6.58 84.31/5.63
CIFAR100   base  DualPrompt 79.85/6.12 80.16/5.76 80.44/6.96 80.70/5.73 80.33/5.86 80.64/5.67 81.78/3.63
CIFAR100   base  L2P        77.71/7.12 79.64/6.35 78.21/9.13 79.56/5.89 78.50/8.04 79.56/6.71 81.79/4.31
CIFAR100   base  APT        83.30/4.35 84.27/4.67 83.51/4.29 83.95/4.64 84.08/4.82 83.81/3.44 84.28/3.89
CIFAR100   large CODAPrompt 86.16/5.63 86.27/5.45 85.42/6.55 85.95/6.56 86.21/5.64 86.78/5.43 87.13/5.30
CIFAR100   large DualPrompt 84.66/5.91 84.67/4.52 84.93/4.95 83.12/8.33 84.11/5.19 85.73/5.05 86.92/4.77
CIFAR100   large L2P        83.02/6.06 85.00/4.48 83.29/4.99 83.60/5.21 83.12/7.97 84.21/6.06 86.56/4.97
CIFAR100   large APT        88.26/3.31 88.79/2.85 88.69/1.79 88.00/3.35 88.60/3.00 88.72/3.15 89.41/2.74
ImageNet_R base  CODAPrompt 67.44/8.52 69.91/7.64 68.92/8.39 69.87/7.38 70.19/7.68 70.74/6.66 71.92/5.61
ImageNet_R base  DualPrompt 65.51/5.93 65.68/7.26 65.44/7.27 66.20/5.93 65.69/6.56 65.82/4.00 68.77/3.13
ImageNet_R base  L2P        63.82/6.52 63.97/6.51 62.91/6.55 64.29/6.37 63.64/6.36 64.99/3.83 68.18/2.08
ImageNet_R base  APT        71.71/4.25 72.65/3.92 71.59/3.90 72.75/4.03 72.70/3.93 72.34/3.71 73.29/3.73
ImageNet_R large CODAPrompt 76.42/4.31 76.99/3.81 76.70/4.84 74.55/6.81 75.72/4.14 77.83/4.51 78.62/3.46
ImageNet_R large DualPrompt 73.18/3.45 73.90/3.31 75.24/4.15 71.23/5.71 72.19/5.72 76.03/3.90 76.06/3.77
ImageNet_R large L2P        73.94/4.41 74.12/4.60 74.58/4.69 70.39/5.84 72.17/6.11 73.99/5.09 76.91/3.15
ImageNet_R large APT        78.67/4.06 79.21/3.74 78.85/2.69 78.88/4.38 78.79/4.15 79.43/3.61 79.83/3.87
"""

Spread = tuple[float, float | None]  # mean and standard deviation


def paper_numbers() -> dict[Row, dict[str, tuple[float, float]]]:
    """The paper's table: row -> column -> accuracy and forgetting."""
    table = {}
    for line in _PAPER.strip().splitlines():
        dataset, pair, learner, *cells = line.split()
        numbers = [tuple(map(float, cell.split("/"))) for cell in cells]
        row = Row(dataset, *_PAIRS[pair], learner)
        table[row] = dict(zip(_PAPER_COLUMNS, numbers, strict=True))
    return table


@dataclass
class Cell:
    """All runs of one row and column, and what the paper has there."""

    complete: list[Run] = field(default_factory=list)
    unfinished: list[Run] = field(default_factory=list)
    paper: tuple[float, float] | None = None

    @property
    def runs(self) -> list[Run]:
        return self.complete + self.unfinished

    def measure(self, name: str, role: str = "student") -> Spread | None:
        """Mean and standard deviation of a measure over the complete runs; None without any."""
        values = [run.models[role][name] for run in self.complete if role in run.models]
        return mean_std(values) if values else None

    def difference(self) -> tuple[float, float] | None:
        """Ours minus the paper's, accuracy and forgetting; None where they cannot be compared."""
        if not self.complete or self.paper is None or not all(run.like_the_paper for run in self.complete):
            return None
        accuracy, forgetting = self.measure("final_average_accuracy")[0], self.measure("forgetting")[0]
        return accuracy - self.paper[0], forgetting - self.paper[1]


@dataclass
class Line:
    """One line of a table; ``label`` is what tells it from other lines of the same row."""

    row: Row
    label: str
    cells: dict[str, Cell]  # by column

    @property
    def name(self) -> str:
        return ", ".join(filter(None, (self.row.models, self.row.learner, self.label)))

    @property
    def runs(self) -> list[Run]:
        return [run for cell in self.cells.values() for run in cell.runs]

    def best(self) -> str | None:
        """The column with our highest mean accuracy, where there are at least two to choose from.

        Only columns with the most seeds take part: a lucky single seed does not make a method better.
        """
        seeds = max(len(cell.complete) for cell in self.cells.values())
        cells = {column: cell for column, cell in self.cells.items() if len(cell.complete) == seeds > 0}
        means = {column: cell.measure("final_average_accuracy")[0] for column, cell in cells.items()}
        return max(means, key=means.get) if len(means) > 1 else None

    def gains(self) -> dict[str, tuple[float, float | None, int]]:
        """Mean, standard error and number of the differences to the runs of the same seeds without distillation."""
        without = {run.seed: run.accuracy for run in self.cells["none"].complete}
        gains = {}
        for column, cell in self.cells.items():
            values = [run.accuracy - without[run.seed] for run in cell.complete if run.seed in without]
            if values and column != "none":
                mean, deviation = mean_std(values)
                gains[column] = (mean, deviation and deviation / len(values) ** 0.5, len(values))
        return gains

    def teacher(self) -> Spread | None:
        """The teacher's accuracy over seeds; per seed the mean over KD methods, which all train it alike."""
        by_seed = defaultdict(list)
        for run in self.runs:
            if run.complete and "teacher" in run.models:
                by_seed[run.seed].append(run.models["teacher"]["final_average_accuracy"])
        return mean_std([statistics.fmean(values) for values in by_seed.values()]) if by_seed else None


def build_tables(runs: Sequence[Run]) -> dict[str, list[Line]]:
    """The table of each data set, in the paper's layout and with all its rows; its lines have the same columns."""
    paper = paper_numbers()
    lines: dict[tuple[Row, str], dict[str, Cell]] = defaultdict(lambda: defaultdict(Cell))
    for run in sorted(runs, key=lambda run: run.seed):
        cell = lines[run.row, run.settings][run.column]
        (cell.complete if run.complete else cell.unfinished).append(run)
    datasets = {row.dataset for row, _ in lines}
    for row in [row for row in paper if row.dataset in datasets]:
        for key in [key for key in lines if key[0] == row] or [(row, "{}")]:
            for column, numbers in paper[row].items():
                lines[key][column].paper = numbers
    tables: dict[str, list[Line]] = defaultdict(list)
    for row, settings in sorted(lines, key=lambda key: ([*paper, key[0]].index(key[0]), key)):
        columns = {*METHODS, *(column for key in lines if key[0].dataset == row.dataset for column in lines[key])}
        cells = {column: lines[row, settings][column] for column in sorted(columns, key=_column_order)}
        label = _label(settings, [others for other, others in lines if other == row])
        tables[row.dataset].append(Line(row, label, cells))
    return tables


def _column_order(column: str) -> tuple[int, int, str]:
    """Sort columns as the paper does, KD_Token by its parameters; methods that it does not have come last."""
    method = column.split(" ")[0]
    return [*METHODS, TOKEN_METHOD, method].index(method), len(column), column


def shared_settings(lines: Sequence[Line]) -> str:
    """The settings of all runs that differ from the defaults, where all lines of a table share them."""
    own, *others = [json.loads(run.settings) for line in lines for run in line.runs]
    own.pop("class_names_sha256", None)
    default = make_config({}).result_settings()
    changed = {key: value for key, value in sorted(own.items()) if value != default.get(key)}
    shared = [f"{key} {value}" for key, value in changed.items() if all(of.get(key) == value for of in others)]
    return f"All runs: {', '.join(shared)}; other settings are the defaults."


def _label(settings: str, of_lines: Sequence[str]) -> str:
    """The settings in which a line differs from others of its row, as ``batch_size 16, lr 0.01``."""
    own, *others = map(json.loads, (settings, *of_lines))
    keys = sorted({key for values in others for key in values})
    differing = [key for key in keys if any(values.get(key) != own.get(key) for values in others)]
    return ", ".join(f"{key} {own.get(key)}" for key in differing)
