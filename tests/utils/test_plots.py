import random

import pytest
from PIL import Image

from utils import plots
from utils.metrics import AccuracyMatrix, build_metrics
from utils.plots import accuracy_limits, curves_png, save_plots

pytest.importorskip("matplotlib")


def fake_metrics(tasks, *, done=None, teacher=True, pool=10, layers=2, signed=False, epochs=2):
    """Metrics of a run that never took place."""
    draw = random.Random(0)
    done = tasks if done is None else done
    roles = ["teacher", "student"] if teacher else ["student"]
    matrix = AccuracyMatrix([[draw.uniform(40, 100) for _ in range(task + 1)] for task in range(done)])
    return build_metrics(
        settings={"dataset": "Emoji_R", "learner_name": "L2P", "KD_method": "KD" if teacher else "none",
                  "t_model": "t", "s_model": "s", "random_s": 0},
        settings_hash="0", num_tasks=tasks, classes=[(i, i + 1) for i in range(tasks)],
        teacher=matrix if teacher else None, student=matrix, parameters={},
        losses={role: [[{"ce": draw.random(), "prompt": draw.random()} for _ in range(epochs)]
                       for _ in range(done)] for role in roles},
        prompt_usage={role: [{f"block {layer}": [draw.uniform(-1 if signed else 0, 1) for _ in range(pool)]
                              for layer in range(layers)} for _ in range(done)] for role in roles},
    )


@pytest.mark.parametrize("arguments", [
    dict(tasks=1), dict(tasks=2, teacher=False, epochs=1, layers=1), dict(tasks=3, done=2, pool=100, signed=True),
    dict(tasks=20, layers=1, teacher=False),
])
def test_pictures_of_runs_of_any_length(tmp_path, arguments):
    written = save_plots(tmp_path, fake_metrics(**arguments))
    assert [path.name for path in written] == [
        "accuracy.png", "accuracy_matrix.png", "losses.png", "prompt_usage.png"]
    assert sorted(tmp_path.iterdir()) == sorted(written)
    for path in written:
        with Image.open(path) as picture:
            picture.load()
            assert min(picture.size) > 200
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 10  # not an empty canvas


def test_same_metrics_same_bytes(tmp_path):
    metrics = fake_metrics(1, layers=1, teacher=False)
    first = [path.read_bytes() for path in save_plots(tmp_path, metrics)]
    assert first == [path.read_bytes() for path in save_plots(tmp_path, metrics)]


def test_parts_that_are_missing_have_no_picture(tmp_path):
    metrics = fake_metrics(2) | {"losses": {}, "prompt_usage": {"student": []}}
    assert [path.name for path in save_plots(tmp_path, metrics)] == ["accuracy.png", "accuracy_matrix.png"]


def test_diverged_losses_and_a_student_shallower_than_its_teacher(tmp_path):
    metrics = fake_metrics(1)
    metrics["losses"]["student"][0][1]["ce"] = None
    for usage in metrics["prompt_usage"]["student"]:
        del usage["block 1"]
    assert len(save_plots(tmp_path, metrics)) == 4


def test_axes_name_their_units():
    metrics = fake_metrics(3)
    axes = plots._draw_accuracy(metrics).axes[0]
    assert axes.get_xlabel() == "Tasks learned" and axes.get_ylabel().endswith("(%)")
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert [label.split(",")[0] for label in labels] == ["teacher", "student"]
    matrices = plots._draw_matrices(metrics).axes
    assert matrices[0].get_ylabel() == "After learning task" and matrices[-1].get_ylabel() == "Accuracy (%)"
    losses = plots._draw_losses(metrics).axes[1]
    assert losses.get_xlabel() == "Task, 2 epochs each"
    assert [text.get_text() for text in losses.get_legend().get_texts()] == ["cross-entropy", "prompts"]
    usage = plots._draw_prompt_usage(metrics).axes
    assert usage[0].get_ylabel() == "After task" and usage[-2].get_xlabel() == "Prompt of the pool"


def test_a_loss_has_one_colour_in_all_panels():
    metrics = fake_metrics(2)
    for task in metrics["losses"]["student"]:
        for epoch in task:
            epoch |= {"loss": 3.0, "feature": 1.0}
    colours = [{line.get_label(): line.get_color() for line in axes.get_legend().get_lines()}
               for axes in plots._draw_losses(metrics).axes]
    assert list(colours[1]) == ["total", "cross-entropy", "prompts", "features"]
    assert colours[0].items() < colours[1].items() and len(set(colours[1].values())) == 4


@pytest.mark.parametrize("rows, label", [
    ([[0.5, 0.5, 0.0]], "Share of images"), ([[1.0, 0.75, 0.25], [1.0, 1.0, 0.0]], "Share of images"),
    ([[0.5, 0.4, 0.0]], "Mean weight"), ([[-0.5, 0.5, 1.0]], "Mean weight"), ([[1.5, 0.5]], "Mean weight"),
])
def test_usage_is_a_share_or_a_weight(rows, label):
    metrics = fake_metrics(len(rows), teacher=False) | {"prompt_usage": {"student": [{"block 0": r} for r in rows]}}
    assert plots._draw_prompt_usage(metrics).axes[-1].get_ylabel() == label


def test_matrix_shows_the_accuracies():
    metrics = fake_metrics(3, done=2, teacher=False)
    texts = [text.get_text() for text in plots._draw_matrices(metrics).axes[0].texts]
    rows = metrics["student"]["accuracy_matrix"]
    assert texts == [f"{value:.0f}" for row in rows for value in row]


def test_curves_of_several_runs():
    curves = {"teacher": [], "student": [[80.0, 70.0], [82.0, 71.0], [81.0]]}
    assert curves_png("KD", curves, (60.0, 90.0), 2).startswith(b"\x89PNG")

    def mean(tasks):
        line = plots._draw_curves("KD", curves, (60.0, 90.0), tasks).axes[0].lines[-1]
        return list(line.get_ydata()), line.get_label()

    assert mean(2) == ([81.0, 70.5], "student, mean of 2")  # of the complete runs
    assert mean(3) == ([81.0], "student, mean of 3")  # where none is complete: as far as all go
    curves["student"] = [[80.0, 70.0], [81.0]]
    assert mean(2) == ([80.0, 70.0], "student, the complete run")


def test_losses_are_the_total_and_its_terms():
    epoch = {"accuracy": 50.0, "ce": 1.0, "distill": None, "gradient": 9.0, "loss": 2.0, "prompt": 0.0}
    assert plots._loss_terms([[epoch]]) == ["loss", "ce", "distill"]
    assert plots._loss_terms([[{"ce": 1.0, "loss": 1.0, "prompt": 0.0}]]) == ["ce"]


def test_limits():
    assert accuracy_limits([[70.0, 71.0]]) == (65.5, 75.5)
    assert accuracy_limits([[0.0, 100.0]]) == (-1.0, 101.0)
    low, high = accuracy_limits([[40.0], [90.0, 80.0]])
    assert low < 40 and high > 90
