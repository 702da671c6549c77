"""Pictures of a run, made from the content of Results/metrics.json.

Colours are those of Okabe and Ito and viridis (safe for colour-blind readers), and roles also differ in their markers.
Equal metrics give equal bytes. Import this module where a picture is drawn, since it loads matplotlib.
"""

from __future__ import annotations

import io
import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

_STYLE = {
    "teacher": {"color": "#0072B2", "marker": "s", "linestyle": "--"},
    "student": {"color": "#D55E00", "marker": "o", "linestyle": "-"},
}
# For loss terms, in this order, the same in all panels.
_OKABE_ITO = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
# What is recorded for each epoch: the sum of the terms, the terms, and what is not a loss.
_TOTAL = "loss"
_TERMS = {_TOTAL: "total", "ce": "cross-entropy", "distill": "distillation", "feature": "features", "prompt": "prompts"}
_NO_LOSSES = {"accuracy", "gradient"}
_RC = {
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "legend.frameon": False,
    "savefig.dpi": 130,
    "figure.constrained_layout.use": True,
    "text.parse_math": False,  # names with a dollar sign are names
}


def draw(metrics: Mapping[str, Any]) -> dict[str, bytes]:
    """The pictures of one run, from the content of metrics.json.

    accuracy.png and accuracy_matrix.png; losses.png and prompt_usage.png where there is something to show.
    """
    figures = {"accuracy.png": _accuracy, "accuracy_matrix.png": _matrices}
    if _roles(metrics["losses"]):
        figures["losses.png"] = _losses
    if any(task for role in _roles(metrics["prompt_usage"]) for task in metrics["prompt_usage"][role]):
        figures["prompt_usage.png"] = _prompt_usage
    return {name: png(figure, metrics) for name, figure in figures.items()}


def accuracy_limits(curves: Iterable[Sequence[float]]) -> tuple[float, float]:
    """A range (%) that holds all curves: at least 10 points, so that noise does not look like a trend.

    It ends slightly beyond 0 and 100, so that a marker on the edge is whole.
    """
    values = [value for curve in curves for value in curve]
    middle, half = (min(values) + max(values)) / 2, max(5.0, 0.58 * (max(values) - min(values)))
    return max(middle - half, -1.0), min(middle + half, 101.0)


def png(make_figure: Callable[..., Figure], *arguments: Any) -> bytes:
    """The bytes of the figure that ``make_figure(*arguments)`` makes."""
    with style.context(["default", _RC]):
        figure = make_figure(*arguments)
        # Laid out once: with a layout engine set, savefig would lay out and draw everything twice.
        figure.get_layout_engine().execute(figure)
        figure.set_layout_engine("none")
        data = io.BytesIO()
        figure.savefig(data, format="png", metadata={"Software": None})
    return data.getvalue()


def _roles(part: Mapping[str, Any]) -> list[str]:
    """The roles that have something in a part of metrics.json, teacher first."""
    return [role for role in ("teacher", "student") if part.get(role)]


def _title(metrics: Mapping[str, Any]) -> str:
    method = metrics["KD_method"]
    how = "without distillation" if method == "none" else f"with {method}"
    return f"{metrics['learner_name']} {how} on {metrics['dataset']}, seed {metrics['seed']}"


def _whole_numbers(most: int) -> MaxNLocator:
    return MaxNLocator(nbins=most, integer=True, min_n_ticks=1)


def _task_axis(axes: Axes, tasks: int, label: str) -> None:
    axes.set(xlim=(0.5, tasks + 0.5), xlabel=label)
    axes.xaxis.set_major_locator(_whole_numbers(20))


def _accuracy(metrics: Mapping[str, Any]) -> Figure:
    axes = Figure(figsize=(6.4, 4.0)).subplots()
    curves = {role: metrics[role]["average_accuracy"] for role in _roles(metrics)}
    for role, values in curves.items():
        label = f"{role}, {values[-1]:.1f} % at the end"
        axes.plot(range(1, len(values) + 1), values, label=label, **_STYLE[role])
    _task_axis(axes, metrics["num_tasks"], "Tasks learned")
    limits = accuracy_limits(curves.values())
    axes.set(title=_title(metrics), ylabel="Mean accuracy on all tasks seen (%)", ylim=limits)
    axes.legend()
    return axes.figure


def draw_curves(
    title: str, curves: Mapping[str, Sequence[Sequence[float]]], limits: tuple[float, float], tasks: int
) -> Figure:
    """acc_i over the tasks of several runs: every run thin, the mean of the complete ones thick.

    Args:
        curves: by role, one list of acc_i (%) per run; shorter than ``tasks`` for an unfinished one.
        limits, tasks: range (%) of the accuracy axis and length of the task axis; equal in pictures to be compared.
    """
    axes = Figure(figsize=(4.4, 3.1)).subplots()
    for role in _roles(curves):
        runs, look = curves[role], _STYLE[role]
        for values in runs:
            marker = look["marker"] if len(values) == 1 else None
            thin = {"color": look["color"], "linewidth": 0.8, "alpha": 0.55, "marker": marker, "markersize": 3}
            axes.plot(range(1, len(values) + 1), values, **thin)
        complete = [values for values in runs if len(values) == tasks]
        mean = [statistics.fmean(values) for values in zip(*(complete or runs), strict=False)]
        counted = "the complete run" if len(complete) == 1 else f"mean of {len(complete or runs)}"
        label = role if len(runs) == 1 else f"{role}, {counted}"
        axes.plot(range(1, len(mean) + 1), mean, label=label, **look)
    _task_axis(axes, tasks, "Tasks learned")
    axes.set(title=title, ylabel="Accuracy on tasks seen (%)", ylim=limits)
    axes.legend(fontsize=9)
    return axes.figure


def _heat_map(axes: Axes, rows: Sequence[Sequence[float]], size: tuple[int, int], **options: Any) -> Any:
    """Rows from the top, padded to ``size`` (rows, columns) with empty cells; both axes count from 1."""
    height, width = size
    full = [[*row, *[math.nan] * (width - len(row))] for row in (*rows, *[()] * (height - len(rows)))]
    axes.grid(False)
    return axes.imshow(full, extent=(0.5, width + 0.5, height + 0.5, 0.5), **options)


def _matrices(metrics: Mapping[str, Any]) -> Figure:
    roles, tasks = _roles(metrics), metrics["num_tasks"]
    side = min(max(0.45 * tasks, 3.2), 7.0)  # inches
    figure = Figure(figsize=(0.6 + len(roles) * (side + 0.6), side + 1.0))
    figure.suptitle(_title(metrics))
    panels = figure.subplots(1, len(roles), squeeze=False)[0]
    for axes, role in zip(panels, roles, strict=True):
        rows = metrics[role]["accuracy_matrix"]
        image = _heat_map(axes, rows, (tasks, tasks), vmin=0, vmax=100)
        cell = {"ha": "center", "va": "center", "fontsize": min(10, 24 * side / tasks)}
        for i, row in enumerate(rows, 1):
            for j, value in enumerate(row, 1):
                axes.text(j, i, f"{value:.0f}", color="black" if value > 60 else "white", **cell)
        accuracy, forgetting = metrics[role]["final_average_accuracy"], metrics[role]["forgetting"]
        title = f"{role}: {accuracy:.1f} %, forgetting {forgetting:.1f} points"
        axes.set(title=title, ylabel="After learning task")
        _task_axis(axes, tasks, "Evaluated on task")
        axes.yaxis.set_major_locator(_whole_numbers(20))
    figure.colorbar(image, ax=list(panels), label="Accuracy (%)", shrink=0.9)
    return figure


def _losses(metrics: Mapping[str, Any]) -> Figure:
    roles = _roles(metrics["losses"])
    terms = {role: _loss_terms(metrics["losses"][role]) for role in roles}
    colors = dict(zip(_total_first(itertools.chain(*terms.values())), itertools.cycle(_OKABE_ITO), strict=False))
    figure = Figure(figsize=(9.0, 0.7 + 2.7 * len(roles)))
    figure.suptitle(_title(metrics))
    for axes, role in zip(figure.subplots(len(roles), 1, squeeze=False)[:, 0], roles, strict=True):
        tasks = metrics["losses"][role]
        epochs = [epoch for task in tasks for epoch in (*task, {})]  # {} is the gap between two tasks
        numbers = itertools.count(1)
        xs = [next(numbers) if epoch else None for epoch in epochs]
        marker = "." if sum(map(len, tasks)) <= 60 or max(map(len, tasks)) == 1 else None
        for term in terms[role]:
            ys = [epoch.get(term) for epoch in epochs]
            axes.plot(xs, ys, label=_TERMS.get(term, term), color=colors[term], linewidth=1.3, marker=marker)
        _epoch_axis(axes, [len(task) for task in tasks])
        axes.set_title(role, loc="left")
        axes.set_ylabel("Mean loss of an epoch")
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _loss_terms(tasks: Sequence[Sequence[Mapping[str, Any]]]) -> list[str]:
    """The total and its terms, without what is not a loss or always 0; the total of a single term is left out."""
    epochs = [epoch for task in tasks for epoch in task]
    terms = _total_first(term for epoch in epochs for term in epoch if term not in _NO_LOSSES)
    terms = [term for term in terms if any(epoch.get(term) != 0 for epoch in epochs)]
    return terms[1:] if len(terms) == 2 and terms[0] == _TOTAL else terms


def _total_first(terms: Iterable[str]) -> list[str]:
    return sorted(dict.fromkeys(terms), key=lambda term: term != _TOTAL)


def _epoch_axis(axes: Axes, epochs: Sequence[int]) -> None:
    """The axis of the epochs: numbered for a single task, otherwise divided into the tasks."""
    axes.set_xlim(0.5, sum(epochs) + 0.5)
    if len(epochs) == 1:
        axes.xaxis.set_major_locator(_whole_numbers(12))
        axes.set_xlabel("Epoch")
        return
    ends = list(itertools.accumulate(epochs, initial=0))
    for end in ends[1:-1]:
        axes.axvline(end + 0.5, color="#888888", linewidth=0.8, linestyle=":")
    axes.grid(False, axis="x")
    axes.tick_params(axis="x", length=0)
    middles = [(start + end + 1) / 2 for start, end in itertools.pairwise(ends)]
    axes.set_xticks(middles, [str(task) for task in range(1, len(epochs) + 1)])
    each = f"{min(epochs)}" if min(epochs) == max(epochs) else f"{min(epochs)} to {max(epochs)}"
    axes.set_xlabel(f"Task, {each} epoch{'' if each == '1' else 's'} each")


def _prompt_usage(metrics: Mapping[str, Any]) -> Figure:
    roles, tasks = _roles(metrics["prompt_usage"]), metrics["num_tasks"]
    usage = {role: metrics["prompt_usage"][role] for role in roles}
    layers = list(dict.fromkeys(layer for role in roles for task in usage[role] for layer in task))
    rows = {(layer, role): [task[layer] for task in usage[role] if layer in task] for layer in layers for role in roles}
    all_rows = [row for panel in rows.values() for row in panel]
    largest = max(abs(value) for row in all_rows for value in row) or 1.0
    # Weights have a sign and a zero in the middle; shares of choices start at 0. One scale for all panels.
    signed = any(value < 0 for row in all_rows for value in row)
    scale = {"cmap": "PuOr" if signed else "viridis", "vmin": -largest if signed else 0.0, "vmax": largest}
    label, of = ("Share of images", " that choose") if _are_shares(all_rows) else ("Mean weight", " of")
    height = 1.1 + (0.55 + min(max(0.16 * tasks, 0.6), 2.4)) * len(layers)
    figure = Figure(figsize=(1.6 + 4.6 * len(roles), height))
    figure.suptitle(f"{_title(metrics)}\n{label}{of} each prompt, test images of the task just learned")
    panels = figure.subplots(len(layers), len(roles), squeeze=False)
    for axes, (layer, role) in zip(panels.flat, rows, strict=True):
        if not rows[layer, role]:  # a shallow student lacks the deepest blocks of its teacher
            axes.set_axis_off()
            continue
        pool = max(map(len, rows[layer, role]))
        image = _heat_map(axes, rows[layer, role], (tasks, pool), aspect="auto", interpolation="nearest", **scale)
        axes.xaxis.set_major_locator(_whole_numbers(11))
        axes.yaxis.set_major_locator(_whole_numbers(6))
        axes.set_title(f"{role}, {layer}", loc="left")
        if layer == [layer for layer in layers if rows[layer, role]][-1]:
            axes.set_xlabel("Prompt of the pool")
        if role == roles[0]:
            axes.set_ylabel("After task")
    figure.colorbar(image, ax=panels, label=label, fraction=0.03, pad=0.02, aspect=30)
    return figure


def _are_shares(rows: Iterable[Sequence[float]]) -> bool:
    """Whether usage counts choices: all images choose equally many prompts, so shares sum to a whole number."""
    sums = [sum(row) if 0 <= min(row) and max(row) <= 1 else 0.0 for row in rows]
    return all(total > 0.5 and math.isclose(total, round(total), abs_tol=1e-6) for total in sums)
