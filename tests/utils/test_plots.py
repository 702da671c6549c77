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
    pictures = plots.draw(metrics_of(tasks, **more))
    assert list(pictures) == ["accuracy.png", "accuracy_matrix.png", "losses.png", "prompt_usage.png"]
    assert pictures == plots.draw(metrics_of(tasks, **more))  # the same bytes
    for png in pictures.values():
        with Image.open(io.BytesIO(png)) as picture:
            assert min(picture.size) > 200
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 10  # not an empty canvas


def test_missing_parts_have_no_picture_and_diverged_losses_have_one():
    metrics = metrics_of(2) | {"losses": {}, "prompt_usage": {"student": []}}
    assert list(plots.draw(metrics)) == ["accuracy.png", "accuracy_matrix.png"]
    metrics = metrics_of(1)
    metrics["losses"]["student"] = [[{"ce": 1.0}, {"ce": None}]]
    metrics["prompt_usage"]["student"] = [{"block 0": [0.5, 0.5]}]  # shallower than its teacher
    assert len(plots.draw(metrics)) == 4


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
    for row, label in {(0.5, 0.5, 0): "Share of images", (0.5, 0.4): "Mean weight", (-0.5, 1.5): "Mean weight"}.items():
        metrics = metrics_of(1, teacher=False) | {"prompt_usage": {"student": [{"block 0": row}]}}
        assert plots._prompt_usage(metrics).axes[-1].get_ylabel() == label


@pytest.mark.parametrize(
    "tasks, runs, mean",
    [
        (2, [[80.0, 70.0], [82.0, 71.0], [81.0]], ([81.0, 70.5], "student, mean of 2")),  # of the complete runs
        (3, [[80.0, 70.0], [82.0, 71.0], [81.0]], ([81.0], "student, mean of 3")),  # as far as all go
        (2, [[80.0, 70.0], [81.0]], ([80.0, 70.0], "student, the complete run")),
    ],
)
def test_curves_of_several_runs(tasks, runs, mean):
    line = plots.draw_curves("KD", {"teacher": [], "student": runs}, (60.0, 90.0), tasks).axes[0].lines[-1]
    assert (list(line.get_ydata()), line.get_label()) == mean


def test_accuracy_limits():
    assert plots.accuracy_limits([[70.0, 71.0]]) == (65.5, 75.5)
    assert plots.accuracy_limits([[0.0, 100.0]]) == (-1.0, 101.0)
    low, high = plots.accuracy_limits([[40.0], [90.0, 80.0]])
    assert low < 40 and high > 90
