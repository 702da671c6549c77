"""Pictures of a run, made from the content of Results/metrics.json.

Colours are those of Okabe and Ito and viridis (safe for colour-blind readers), and roles also differ in their markers.
Equal metrics give equal bytes. Import this module where a picture is drawn, since it loads matplotlib.
"""

import io
import itertools
import math
import statistics
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from utils.metrics import mean_std

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
_MARKERS = "xosD^v*"
_COLUMN = 3.5  # inches, the width of a column of a paper: text keeps its size of 8 pt there
_RC = {
    "font.size": 8,
    "axes.titlesize": 8,
    "legend.fontsize": 7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.5,
    "axes.axisbelow": True,
    "lines.linewidth": 1.3,
    "lines.markersize": 3.5,
    "legend.frameon": False,
    "savefig.dpi": 220,
    "pdf.fonttype": 42,  # letters stay text
    "figure.constrained_layout.use": True,
    "text.parse_math": False,  # names with a dollar sign are names
}
# Nothing that differs between two equal pictures.
_METADATA = {"png": {"Software": None}, "pdf": {"Creator": None, "Producer": None, "CreationDate": None}}


def draw(metrics: Mapping[str, Any]) -> dict[str, bytes]:
    """The pictures of one run that have something to show, as PNG and as PDF, from the content of metrics.json."""
    curves = {role: [metrics[role]["average_accuracy"]] for role in _roles(metrics)}
    figures = {
        "accuracy": (draw_curves, _title(metrics), curves, metrics["num_tasks"]),
        "accuracy_matrix": (_matrices, metrics),
    }
    if _roles(metrics["losses"]):
        figures["losses"] = (_losses, metrics)
    if any(task for role in _roles(metrics["prompt_usage"]) for task in metrics["prompt_usage"][role]):
        figures["prompt_usage"] = (_prompt_usage, metrics)
    return {f"{name}.{ending}": data for name, of in figures.items() for ending, data in render(*of).items()}


def draw_repeat(runs: Sequence[Mapping[str, Any]]) -> dict[str, bytes]:
    """accuracy.png and accuracy.pdf over the seeds of ``--repeat``, from the content of each one's metrics.json."""
    curves = {role: [run[role]["average_accuracy"] for run in runs] for role in _roles(runs[0])}
    title = _title(runs[0]).replace(f"seed {runs[0]['seed']}", f"{len(runs)} seeds, mean ± standard deviation")
    return {f"accuracy.{of}": data for of, data in render(draw_curves, title, curves, runs[0]["num_tasks"]).items()}


def accuracy_limits(curves: Iterable[Sequence[float]]) -> tuple[float, float]:
    """A range (%) of at least 10 points, less being noise, that holds all curves and the markers at 0 and 100."""
    values = [value for curve in curves for value in curve]
    middle, half = (min(values) + max(values)) / 2, max(5.0, 0.58 * (max(values) - min(values)))
    return max(middle - half, -1.0), min(middle + half, 101.0)


def render(make_figure: Callable[..., Figure], *arguments: Any, endings: Sequence[str] = ("png", "pdf")) -> dict:
    """The bytes of the figure that ``make_figure(*arguments)`` makes, in each format."""
    data = {ending: io.BytesIO() for ending in endings}
    with style.context(["default", _RC]):
        figure = make_figure(*arguments)
        # Laid out once: with a layout engine set, savefig would lay out and draw everything twice.
        figure.get_layout_engine().execute(figure)
        figure.set_layout_engine("none")
        for ending, file in data.items():
            figure.savefig(file, format=ending, metadata=_METADATA[ending])
    return {ending: file.getvalue() for ending, file in data.items()}


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
    axes.xaxis.set_major_locator(_whole_numbers(10))


def _figure(height: float, title: str) -> Figure:
    """A figure as wide as a column, with a title in as many lines as it takes."""
    figure = Figure(figsize=(_COLUMN, height))
    figure.suptitle(textwrap.fill(title, 58), fontsize=8)
    return figure


def draw_curves(
    title: str, curves: Mapping[str, Sequence[Sequence[float]]], tasks: int, limits: tuple[float, float] = (-1.0, 101.0)
) -> Figure:
    """acc_i over the tasks: for each name the mean of its complete runs, with their standard deviation as a band.

    Args:
        curves: by role or KD method, one list of acc_i (%) per run; shorter than ``tasks`` for an unfinished one.
        limits: range (%) of the accuracy axis.
    """
    figure = _figure(2.4 + 0.08 * len(curves), title)
    axes = figure.subplots()
    for number, (name, runs) in enumerate(curves.items()):
        used = [values for values in runs if len(values) == tasks] or runs
        means, deviations = zip(*(mean_std(values) for values in zip(*used, strict=False)), strict=True)
        look = {"marker": _MARKERS[number % 7], "color": _OKABE_ITO[number % 7], "linestyle": "-"}
        look |= _STYLE.get(name, {"linestyle": ":"} if name == "none" else {})
        spread = "" if deviations[-1] is None else f" ± {deviations[-1]:.1f}"
        cut = "" if len(means) == tasks else f" after {len(means)} of {tasks} tasks"
        places = range(1, len(means) + 1)
        axes.plot(places, means, label=f"{name}: {means[-1]:.1f}{spread} %{cut}", **look)
        if spread and len(curves) <= 2:  # more bands hide one another
            low, high = ([m + sign * each for m, each in zip(means, deviations, strict=True)] for sign in (-1, 1))
            axes.fill_between(places, low, high, color=look["color"], alpha=0.2, linewidth=0)
    _task_axis(axes, tasks, "Tasks learned")
    axes.set(ylabel="Accuracy on tasks seen (%)", ylim=limits)
    figure.legend(loc="outside lower center", ncols=1 if len(curves) < 3 else 2)
    return figure


def _heat_map(axes: Axes, rows: Sequence[Sequence[float]], size: tuple[int, int], **options: Any) -> Any:
    """Rows from the top, padded to ``size`` (rows, columns) with empty cells; both axes count from 1."""
    height, width = size
    full = [[*row, *[math.nan] * (width - len(row))] for row in (*rows, *[()] * (height - len(rows)))]
    axes.grid(False)
    return axes.imshow(full, extent=(0.5, width + 0.5, height + 0.5, 0.5), **options)


def _matrices(metrics: Mapping[str, Any]) -> Figure:
    roles, tasks = _roles(metrics), metrics["num_tasks"]
    figure = _figure(0.3 + 3.0 * len(roles), _title(metrics))
    panels = figure.subplots(len(roles), 1, squeeze=False)[:, 0]
    for axes, role in zip(panels, roles, strict=True):
        rows = metrics[role]["accuracy_matrix"]
        image = _heat_map(axes, rows, (tasks, tasks), vmin=0, vmax=100)
        cell = {"ha": "center", "va": "center", "fontsize": min(8, 64 / tasks)}
        for i, row in enumerate(rows, 1):
            for j, value in enumerate(row if tasks <= 12 else (), 1):  # more would be too small to read
                axes.text(j, i, f"{value:.0f}", color="black" if value > 60 else "white", **cell)
        accuracy, forgetting = metrics[role]["final_average_accuracy"], metrics[role]["forgetting"]
        axes.set(title=f"{role}: {accuracy:.1f} %, forgetting {forgetting:.1f} points", ylabel="After learning task")
        _task_axis(axes, tasks, "Evaluated on task")
        axes.yaxis.set_major_locator(_whole_numbers(10))
    figure.colorbar(image, ax=list(panels), label="Accuracy (%)", aspect=40)
    return figure


def _losses(metrics: Mapping[str, Any]) -> Figure:
    roles = _roles(metrics["losses"])
    terms = {role: _loss_terms(metrics["losses"][role]) for role in roles}
    colors = dict(zip(_total_first(itertools.chain(*terms.values())), itertools.cycle(_OKABE_ITO), strict=False))
    figure = _figure(0.5 + 1.9 * len(roles), _title(metrics))
    for axes, role in zip(figure.subplots(len(roles), 1, squeeze=False)[:, 0], roles, strict=True):
        tasks = metrics["losses"][role]
        epochs = [epoch for task in tasks for epoch in (*task, {})]  # {} is the gap between two tasks
        numbers = itertools.count(1)
        xs = [next(numbers) if epoch else None for epoch in epochs]
        marker = "." if sum(map(len, tasks)) <= 60 or max(map(len, tasks)) == 1 else None
        for term in terms[role]:
            ys = [epoch.get(term) for epoch in epochs]
            axes.plot(xs, ys, label=_TERMS.get(term, term), color=colors[term], linewidth=0.9, marker=marker)
        _epoch_axis(axes, [len(task) for task in tasks])
        axes.set_title(role, loc="left")
        axes.set_ylabel("Mean loss of an epoch")
        axes.legend(loc="upper right", ncols=2)
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
    """The axis of the epochs, divided into the tasks."""
    axes.set_xlim(0.5, sum(epochs) + 0.5)
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
    """How much of a task's use of the pool goes to entries of earlier tasks; below, the use of one block's entries."""
    roles, tasks, own = _roles(metrics["prompt_usage"]), metrics["num_tasks"], metrics["prompts_per_task"]
    usage = {role: metrics["prompt_usage"][role] for role in roles}
    layer = next(layer for role in roles for task in usage[role] for layer in task)  # the first, which all models have
    rows = {role: [task[layer] for task in usage[role] if layer in task] for role in roles}
    # If entries are chosen, all images choose equally many, so that the shares of a task sum to a whole number.
    sums = [sum(row) if 0 <= min(row) and max(row) <= 1 else 0.0 for row in itertools.chain(*rows.values())]
    choices = all(total > 0.5 and math.isclose(total, round(total), abs_tol=1e-6) for total in sums)
    label, of = ("Share of images", "choices") if choices else ("Weight", "weights")
    which = "prompts of earlier tasks" if own else "prompts that earlier tasks used"
    figure = _figure(2.2 + 1.3 * len(roles), f"{_title(metrics)}: share of a task's {of} that goes to {which}")
    top, *panels = figure.subplots(1 + len(roles), 1, height_ratios=[1.4, *[1] * len(roles)])
    for role in roles:
        blocks = [[task[layer] for task in usage[role]] for layer in usage[role][-1]]
        shares = [statistics.fmean(task) for task in zip(*(_earlier(block, own) for block in blocks), strict=True)]
        top.plot(range(1, len(shares) + 1), shares, label=role, **_STYLE[role])
    _task_axis(top, tasks, "Task")
    top.set(ylim=(-2, 102), ylabel="Mean over blocks (%)")
    top.legend(loc="lower right")
    values = list(itertools.chain(*itertools.chain(*rows.values())))
    largest, signed = max(map(abs, values)) or 1.0, min(values) < 0
    # Weights have a sign and a zero in the middle; shares of choices start at 0. One scale for both models.
    scale = {"cmap": "PuOr" if signed else "viridis", "vmin": -largest if signed else 0.0, "vmax": largest}
    for axes, (role, of_tasks) in zip(panels, rows.items(), strict=True):
        size = (tasks, max(map(len, of_tasks)))
        image = _heat_map(axes, of_tasks, size, aspect="auto", interpolation="nearest", **scale)
        axes.xaxis.set_major_locator(_whole_numbers(10))
        axes.yaxis.set_major_locator(_whole_numbers(6))
        axes.set(title=f"{role}, {layer}", xlabel="Prompt of the pool", ylabel="After task")
    figure.colorbar(image, ax=panels, label=label, aspect=30)
    return figure


def _earlier(rows: Sequence[Sequence[float]], per_task: int) -> list[float]:
    """For each task the share (%) of its row in the ``per_task`` entries of each earlier one; 0: in those in use."""
    used, shares = set(), []
    for task, row in enumerate(rows):
        earlier = row[: task * per_task] if per_task else [row[j] for j in used]
        shares.append(100 * sum(map(abs, earlier)) / (sum(map(abs, row)) or 1.0))
        used |= {j for j, value in enumerate(row) if value}
    return shares
