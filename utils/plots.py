"""Pictures of a run, made from the content of Results/metrics.json.

Colours are those of Okabe and Ito and viridis (colour-blind-safe), and roles also differ in their markers.
The files are the same bytes for the same metrics. matplotlib is imported only when a picture is drawn.
"""

from __future__ import annotations

import io
import itertools
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.checkpoint import write_atomic

TEACHER, STUDENT = "#0072B2", "#D55E00"
_STYLE = {"teacher": {"color": TEACHER, "marker": "s", "linestyle": "--"},
          "student": {"color": STUDENT, "marker": "o", "linestyle": "-"}}
# For loss terms, in this order, the same in all panels.
_OKABE_ITO = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
# Of what is recorded for each epoch: the sum of the terms, and what is not a loss.
_TOTAL = "loss"
_NO_LOSSES = {"accuracy", "gradient"}
_TERM_NAMES = {_TOTAL: "total", "ce": "cross-entropy", "distill": "distillation", "feature": "features",
               "prompt": "prompts"}
_RC = {
    "font.size": 10, "axes.titlesize": 11, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": "#dddddd", "grid.linewidth": 0.6, "axes.axisbelow": True,
    "lines.linewidth": 1.8, "lines.markersize": 5, "legend.frameon": False, "savefig.dpi": 130,
    "text.parse_math": False,  # names with a dollar sign are names
}


def save_plots(results_dir: Path, metrics: Mapping[str, Any]) -> list[Path]:
    """Write the pictures of one run.

    Args:
        results_dir: the run's Results folder; must exist.
        metrics: content of metrics.json. Without a teacher, losses or prompt usage their pictures are
            left out.

    Returns:
        The files written: accuracy.png, accuracy_matrix.png, losses.png, prompt_usage.png.
    """
    drawings = {
        "accuracy.png": _draw_accuracy,
        "accuracy_matrix.png": _draw_matrices,
        "losses.png": _draw_losses,
        "prompt_usage.png": _draw_prompt_usage,
    }
    written = []
    for name, draw in drawings.items():
        png = _png(draw, metrics)
        if png is not None:
            write_atomic(results_dir / name, png)
            written.append(results_dir / name)
    return written


def curves_png(
    title: str, curves: Mapping[str, Sequence[Sequence[float]]], limits: tuple[float, float], tasks: int
) -> bytes:
    """acc_i over the tasks of several runs: every run thin, the mean of the complete ones thick.

    Args:
        title: stands above the picture.
        curves: role ("teacher", "student") -> one list of acc_i (%) per run; shorter than ``tasks`` for an
            unfinished one.
        limits: range of the accuracy axis (%), the same for pictures that are to be compared.
        tasks: length of the task axis, the same for them, too.
    """
    png = _png(_draw_curves, title, curves, limits, tasks)
    assert png is not None
    return png


def accuracy_limits(curves: Iterable[Sequence[float]]) -> tuple[float, float]:
    """A range (%) that holds all curves: at least 10 points, lest noise look like a trend.

    It ends a sliver beyond 0 and 100: no accuracy lies there, but a marker on the edge must show whole.
    """
    values = [value for curve in curves for value in curve]
    middle, half = (min(values) + max(values)) / 2, max(5.0, 0.58 * (max(values) - min(values)))
    return max(middle - half, -1.0), min(middle + half, 101.0)


def _png(draw: Any, *arguments: Any) -> bytes | None:
    """Run ``draw(*arguments)``, which returns a figure or None, and return the figure's PNG."""
    import matplotlib
    import matplotlib.style

    with matplotlib.style.context(["default", _RC]):
        figure = draw(*arguments)
        if figure is None:
            return None
        # Laid out once: with a layout engine set, savefig would lay out and draw everything twice.
        figure.get_layout_engine().execute(figure)
        figure.set_layout_engine("none")
        data = io.BytesIO()
        figure.savefig(data, format="png", metadata={"Software": None})
    return data.getvalue()


def _figure(width: float, height: float) -> Any:
    """A figure of its own, without pyplot's global list of figures (sizes in inches)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _roles(metrics: Mapping[str, Any], part: str | None = None) -> list[str]:
    """The roles that have results (or something in ``part``), teacher first."""
    found = metrics if part is None else metrics.get(part) or {}
    return [role for role in ("teacher", "student") if found.get(role)]


def _title(metrics: Mapping[str, Any]) -> str:
    method = str(metrics["KD_method"])
    how = "without distillation" if method == "none" else f"with {method}"
    return f"{metrics['learner_name']} {how} on {metrics['dataset']}, seed {metrics['seed']}"


def _task_axis(axes: Any, tasks: int, label: str = "Tasks learned") -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlim(0.5, tasks + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=20, integer=True, min_n_ticks=1))
    axes.set_xlabel(label)


def _draw_accuracy(metrics: Mapping[str, Any]) -> Any:
    figure = _figure(6.4, 4.0)
    axes = figure.subplots()
    for role in _roles(metrics):
        values = metrics[role]["average_accuracy"]
        label = f"{role}, {values[-1]:.1f} % at the end"
        axes.plot(range(1, len(values) + 1), values, label=label, **_STYLE[role])
    _task_axis(axes, metrics["num_tasks"])
    axes.set_ylabel("Mean accuracy on all tasks seen (%)")
    axes.set_ylim(*accuracy_limits(metrics[role]["average_accuracy"] for role in _roles(metrics)))
    axes.set_title(_title(metrics))
    axes.legend()
    return figure


def _draw_curves(
    title: str, curves: Mapping[str, Sequence[Sequence[float]]], limits: tuple[float, float], tasks: int
) -> Any:
    figure = _figure(4.4, 3.1)
    axes = figure.subplots()
    for role, runs in curves.items():
        if not runs:
            continue
        style = _STYLE[role]
        for values in runs:
            axes.plot(range(1, len(values) + 1), values, color=style["color"], linewidth=0.8, alpha=0.55,
                      marker=style["marker"] if len(values) == 1 else None, markersize=3)
        # Of unfinished runs alone the mean goes as far as all of them.
        counted = [values for values in runs if len(values) == tasks] or runs
        mean = [statistics.fmean(column) for column in zip(*counted, strict=False)]
        axes.plot(range(1, len(mean) + 1), mean, label=_curve_label(role, len(counted), len(runs)), **style)
    _task_axis(axes, tasks)
    axes.set_ylabel("Accuracy on tasks seen (%)")
    axes.set_ylim(*limits)
    axes.set_title(title)
    axes.legend(fontsize=9)
    return figure


def _curve_label(role: str, counted: int, runs: int) -> str:
    if runs == 1:
        return role
    return f"{role}, the complete run" if counted == 1 else f"{role}, mean of {counted}"


def _draw_matrices(metrics: Mapping[str, Any]) -> Any:
    from matplotlib.ticker import MaxNLocator

    roles, tasks = _roles(metrics), metrics["num_tasks"]
    side = min(max(0.45 * tasks, 3.2), 7.0)
    figure = _figure(0.6 + len(roles) * (side + 0.6), side + 1.0)
    all_axes = figure.subplots(1, len(roles), squeeze=False)[0]
    picture = None
    for axes, role in zip(all_axes, roles, strict=True):
        rows = metrics[role]["accuracy_matrix"]
        full = [row + [float("nan")] * (tasks - len(row)) for row in rows]
        full += [[float("nan")] * tasks] * (tasks - len(rows))
        picture = axes.imshow(full, vmin=0, vmax=100, extent=(0.5, tasks + 0.5, tasks + 0.5, 0.5))
        _write_cells(axes, rows, side / tasks)
        axes.grid(False)
        axes.set_title(f"{role}: {metrics[role]['final_average_accuracy']:.1f} %, "
                       f"forgetting {metrics[role]['forgetting']:.1f} points")
        _task_axis(axes, tasks, "Evaluated on task")
        axes.yaxis.set_major_locator(MaxNLocator(nbins=20, integer=True, min_n_ticks=1))
        axes.set_ylabel("After learning task")
    figure.colorbar(picture, ax=list(all_axes), label="Accuracy (%)", shrink=0.9)
    figure.suptitle(_title(metrics))
    return figure


def _write_cells(axes: Any, rows: Sequence[Sequence[float]], inches: float) -> None:
    """The accuracies as whole numbers in cells of a width of ``inches``, dark on light and light on dark."""
    for i, row in enumerate(rows):
        for j, value in enumerate(row):
            axes.text(j + 1, i + 1, f"{value:.0f}", ha="center", va="center", fontsize=min(10, 24 * inches),
                      color="black" if value > 60 else "white")


def _draw_losses(metrics: Mapping[str, Any]) -> Any:
    roles = _roles(metrics, "losses")
    if not roles:
        return None
    figure = _figure(9.0, 0.7 + 2.7 * len(roles))
    all_axes = figure.subplots(len(roles), 1, squeeze=False)[:, 0]
    all_terms = dict.fromkeys(term for role in roles for term in _loss_terms(metrics["losses"][role]))
    colors = dict(zip(sorted(all_terms, key=lambda term: term != _TOTAL), _OKABE_ITO, strict=False))
    for axes, role in zip(all_axes, roles, strict=True):
        tasks = metrics["losses"][role]
        for term in _loss_terms(tasks):
            if term in colors:
                _loss_line(axes, term, colors[term], tasks)
        _loss_axis(axes, [len(task) for task in tasks])
        axes.set_title(role, loc="left")
        axes.set_ylabel("Mean loss of an epoch")
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.suptitle(_title(metrics))
    return figure


def _loss_terms(tasks: Sequence[Sequence[Mapping[str, Any]]]) -> list[str]:
    """The total and the terms that it is made of; what is no loss, always 0 or the total itself is left out."""
    epochs = [epoch for task in tasks for epoch in task]
    terms = [term for term in dict.fromkeys(term for epoch in epochs for term in epoch)
             if term not in _NO_LOSSES and any(epoch.get(term) != 0 for epoch in epochs)]
    if _TOTAL in terms and len(terms) == 2:
        terms.remove(_TOTAL)
    return sorted(terms, key=lambda term: term != _TOTAL)


def _loss_line(axes: Any, term: str, color: str, tasks: Sequence[Sequence[Mapping[str, Any]]]) -> None:
    """One term over the epochs of all tasks, with a gap where the next task begins."""
    xs: list[float] = []
    ys: list[float] = []
    epochs_before = 0
    for task in tasks:
        values = [epoch.get(term) for epoch in task]
        xs += [*(epochs_before + epoch for epoch in range(1, len(task) + 1)), float("nan")]
        ys += [*(float("nan") if value is None else value for value in values), float("nan")]
        epochs_before += len(task)
    marker = "." if epochs_before <= 60 or max(map(len, tasks)) == 1 else None
    axes.plot(xs, ys, label=_TERM_NAMES.get(term, term), color=color, linewidth=1.3, marker=marker)


def _loss_axis(axes: Any, epochs: Sequence[int]) -> None:
    """The axis of the epochs: with one task their numbers, with several the tasks."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlim(0.5, sum(epochs) + 0.5)
    if len(epochs) == 1:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True, min_n_ticks=1))
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


def _draw_prompt_usage(metrics: Mapping[str, Any]) -> Any:
    roles = _roles(metrics, "prompt_usage")
    usage = {role: metrics["prompt_usage"][role] for role in roles}
    layers = list(dict.fromkeys(layer for role in roles for task in usage[role] for layer in task))
    if not layers:
        return None
    tasks = metrics["num_tasks"]
    values = [value for role in roles for task in usage[role] for row in task.values() for value in row]
    signed = min(values, default=0.0) < 0
    largest = max(map(abs, values), default=0.0) or 1.0
    # Weights have a sign and a zero in the middle; shares of choices start at 0. One scale for all panels.
    scale = {"cmap": "PuOr" if signed else "viridis", "vmin": -largest if signed else 0.0, "vmax": largest}
    figure = _figure(1.6 + 4.6 * len(roles), 1.1 + (0.55 + min(max(0.16 * tasks, 0.6), 2.4)) * len(layers))
    all_axes = figure.subplots(len(layers), len(roles), squeeze=False)
    picture = None
    for (row, layer), (column, role) in itertools.product(enumerate(layers), enumerate(roles)):
        axes = all_axes[row][column]
        rows = [task[layer] for task in usage[role] if layer in task]
        if not rows:  # a shallow student lacks the deepest blocks of its teacher
            axes.set_axis_off()
            continue
        picture = _usage_panel(axes, rows, tasks, scale)
        axes.set_title(f"{role}, {layer}", loc="left")
        if not any(below in task for below in layers[row + 1:] for task in usage[role]):
            axes.set_xlabel("Prompt of the pool")
        if column == 0:
            axes.set_ylabel("After task")
    shares = _are_shares(row for role in roles for task in usage[role] for row in task.values())
    figure.colorbar(picture, ax=all_axes, label="Share of images" if shares else "Mean weight", fraction=0.03,
                    pad=0.02, aspect=30)
    what = "Share of images that choose each prompt" if shares else "Mean weight of each prompt"
    figure.suptitle(f"{_title(metrics)}\n{what}, test images of the task just learned")
    return figure


def _are_shares(rows: Iterable[Sequence[float]]) -> bool:
    """Whether usage counts choices: each image makes the same number of them, so that shares sum to it."""
    return all(min(row) >= 0 and max(row) <= 1 and sum(row) > 0.5 and abs(sum(row) - round(sum(row))) < 1e-6
               for row in rows if row)


def _usage_panel(axes: Any, rows: Sequence[Sequence[float]], tasks: int, scale: Mapping[str, Any]) -> Any:
    """One heat map: a line per task learned, a column per prompt of the pool; tasks to come stay empty."""
    from matplotlib.ticker import MaxNLocator

    pool = max(len(row) for row in rows)
    full = [list(row) + [float("nan")] * (pool - len(row)) for row in rows]
    full += [[float("nan")] * pool] * (tasks - len(rows))
    axes.grid(False)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=11, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    return axes.imshow(full, aspect="auto", interpolation="nearest",
                       extent=(0.5, pool + 0.5, tasks + 0.5, 0.5), **scale)
