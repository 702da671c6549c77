import io
import random

import pytest
from PIL import Image

from tests.utils.fakes import fake_metrics
from utils import plots


def metrics_of(tasks, *, done=None, teacher=True, lowest=0.0):
    """Metrics with random numbers; ``lowest`` bounds the prompt usage."""
    draw = random.Random(0)
    done = done or tasks
    roles = ["teacher", "student"] if teacher else ["student"]
    rows = [[draw.uniform(40, 100) for _ in range(task + 1)] for task in range(done)]
    usage = {f"block {layer}": [draw.uniform(lowest, 1) for _ in range(10)] for layer in range(2)}
    losses = [[{"ce": draw.random(), "prompt": draw.random()} for _ in range(2)] for _ in range(done)]
    parts = {"losses": dict.fromkeys(roles, losses), "prompt_usage": dict.fromkeys(roles, [usage] * done)}
    return fake_metrics(rows, rows if teacher else None, num_tasks=tasks, **parts)


@pytest.mark.parametrize("tasks, more", [(3, {"done": 2, "lowest": -1.0}), (20, {"teacher": False})])
def test_pictures_of_runs_of_any_length(tasks, more):
    metrics = metrics_of(tasks, **more) | {"dataset": "a data set of a name that is as long as " * 3}
    pictures = plots.draw(metrics)
    names = [
        f"{name}.{of}" for name in ("accuracy", "accuracy_matrix", "losses", "prompt_usage") for of in ("png", "pdf")
    ]
    assert list(pictures) == names
    assert pictures == plots.draw(metrics)  # the same bytes
    for name, picture in pictures.items():
        if name.endswith(".pdf"):
            assert picture.startswith(b"%PDF") and b"/Type3" not in picture
            continue
        with Image.open(io.BytesIO(picture)) as image:
            assert min(image.size) > 400
            assert len(image.convert("RGB").getcolors(1 << 24)) > 10  # not an empty canvas
            edge = (
                image.convert("L").crop((0, 0, 3, image.height)),
                image.convert("L").crop((767, 0, 770, image.height)),
            )
            assert all(strip.getextrema() == (255, 255) for strip in edge)  # no title is cut


def test_missing_parts_have_no_picture_and_diverged_losses_have_one():
    metrics = metrics_of(2) | {"losses": {}, "prompt_usage": {"student": []}}
    assert {name.partition(".")[0] for name in plots.draw(metrics)} == {"accuracy", "accuracy_matrix"}
    metrics = metrics_of(1)
    metrics["losses"]["student"] = [[{"ce": 1.0}, {"ce": None}]]
    metrics["prompt_usage"]["student"] = [{"block 0": [0.5, 0.5]}]  # shallower than its teacher
    assert len(plots.draw(metrics)) == 8


def test_losses_have_a_total_and_one_colour_per_term_in_all_panels():
    metrics = metrics_of(2)
    epoch = {"accuracy": 50.0, "ce": 1.0, "distill": None, "gradient": 9.0, "loss": 2.0, "prompt": 0.0}
    metrics["losses"]["student"] = [[epoch], [epoch]]
    legends = [axes.get_legend().get_lines() for axes in plots._losses(metrics).axes]
    colours = [{line.get_label(): line.get_color() for line in lines} for lines in legends]
    assert [list(of) for of in colours] == [["cross-entropy", "prompts"], ["total", "cross-entropy", "distillation"]]
    assert colours[0]["cross-entropy"] == colours[1]["cross-entropy"] and len(set(colours[1].values())) == 3
    assert plots._loss_terms([[{"ce": 1.0, "loss": 1.0, "prompt": 0.0}]]) == ["ce"]


def test_usage_is_a_share_or_a_weight():
    for row, label in {(0.5, 0.5, 0): "Share of images", (0.5, 0.4): "Weight", (-0.5, 1.5): "Weight"}.items():
        metrics = metrics_of(1, teacher=False) | {"prompt_usage": {"student": [{"block 0": row}]}}
        assert plots._prompt_usage(metrics).axes[-1].get_ylabel() == label


@pytest.mark.parametrize("per_task, expected", [(1, [0, 25, 80]), (2, [0, 100, 100]), (0, [0, 75, 100])])
def test_share_of_earlier_prompts_is_the_mean_over_blocks(per_task, expected):
    rows = [[0, 0.5, 0, 0.5], [0.25, -0.75, 0, 0], [0.2, 0.6, 0, 0.2]]
    usage = [{"block 0": row, "block 1": row} for row in rows]
    metrics = metrics_of(3, teacher=False) | {"prompt_usage": {"student": usage}, "prompts_per_task": per_task}
    assert list(plots._prompt_usage(metrics).axes[0].lines[0].get_ydata()) == pytest.approx(expected)


@pytest.mark.parametrize(
    "tasks, runs, mean, label",
    [
        (2, [[80.0, 70.0], [82.0, 71.0], [81.0]], [81.0, 70.5], "70.5 ± 0.7 %"),  # of the complete runs
        (3, [[80.0, 70.0], [82.0, 71.0], [81.0]], [81.0], "81.0 ± 1.0 % after 1 of 3 tasks"),  # as far as all go
        (2, [[80.0, 70.0], [81.0]], [80.0, 70.0], "70.0 %"),
    ],
)
def test_curves_are_means_with_their_spread(tasks, runs, mean, label):
    axes = plots.draw_curves("title", {"none": [[50.0] * tasks], "student": runs}, tasks).axes[0]
    assert (list(axes.lines[1].get_ydata()), axes.lines[1].get_label()) == (mean, f"student: {label}")
    assert axes.get_ylim() == (-1, 101) and [line.get_linestyle() for line in axes.lines] == [":", "-"]
    assert len(axes.collections) == ("±" in label)
    assert {*plots.draw_repeat([metrics_of(2), metrics_of(2)])} == {"accuracy.png", "accuracy.pdf"}


def test_accuracy_limits():
    assert plots.accuracy_limits([[70.0, 71.0]]) == (65.5, 75.5)
    assert plots.accuracy_limits([[0.0, 100.0]]) == (-1.0, 101.0)
    low, high = plots.accuracy_limits([[40.0], [90.0, 80.0]])
    assert low < 40 and high > 90
