"""Every learner and every KD method through ``run.py``, two tasks on small images."""

import importlib
import json
import math
import subprocess
import sys

import pytest

import run
from learners.distillers import DISTILLERS
from models.prompts import PROMPTS
from tests import runs
from tests.learners import small
from tests.processes import ROOT
from utils.checkpoint import from_bytes

PROMPT_PARAM = {"CODAPrompt": (5, 4, 1), "DualPrompt": (4, 4, 4), "L2P": (5, 4, 1)}


@pytest.mark.parametrize(("pool", "kd_method"), small.EACH)
def test_every_learner_and_method(pool, kd_method, config, tmp_path):
    flags = ("--learner_name", pool, "--KD_method", kd_method, "--schedule", 1)
    flags += ("--prompt_param", *PROMPT_PARAM.get(pool, PROMPTS[pool].paper))
    folder = runs.finish(config, tmp_path / "run", *flags)
    roles = {"T": "teacher", "S": "student"} if DISTILLERS[kd_method].needs_teacher else {"S": "student"}
    expected = {"args.yaml", "classes.json", "output.log"}
    expected |= {f"Results/{name}" for name in ("acc_s.csv", "metrics.json", "timing.json", "accuracy.png")}
    expected |= {f"models/task-{task}/{letter}_class.pth" for task in (1, 2) for letter in roles}
    expected |= {"Results/acc.csv"} if "T" in roles else set()
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {name for name in found if not name.startswith("state/")} == expected

    metrics = json.loads((folder / "Results/metrics.json").read_text())
    counts = {"split": "folder", "classes": 4, "train_images": 28, "test_images": 12}
    assert counts.items() <= metrics["data"].items()
    assert metrics["complete"] and (metrics["teacher"] is None) == ("T" not in roles)
    for letter, role in roles.items():
        table = (folder / f"Results/acc{'_s' if letter == 'S' else ''}.csv").read_text().split()
        assert table == [f"{value:.2f}" for value in metrics[role]["average_accuracy"]] and len(table) == 2
        epochs = [epoch for task in metrics["losses"][role] for epoch in task]
        assert all(math.isfinite(value) for epoch in epochs for value in epoch.values())
        state = from_bytes((folder / f"models/task-2/{letter}_class.pth").read_bytes())
        assert all(tensor.isfinite().all() for tensor in state.values())
        assert "last.weight" in state
    log = (folder / "output.log").read_text().splitlines()
    student = metrics["student"]
    summary = [f"Acc | mean: {student['final_average_accuracy']:.2f}", f"Forgetting: {student['forgetting']:.2f}"]
    assert log[-3:] == ["===Summary of student experiment===", *summary]

    timing = json.loads((folder / "Results/timing.json").read_text())
    assert list(timing["speed"]) == [*roles.values(), "evaluation"]
    for phase, speed in timing["speed"].items():
        tflop = speed["gflop_per_image"] * speed["images_per_second"] / 1000
        assert speed["tflop_per_second"] == pytest.approx(tflop)
        assert speed["share_of_product"] == pytest.approx(tflop / timing["product_tflop_per_second"])
        assert 0 < speed["waited_for_data"] < speed["seconds"] <= timing["total_seconds"]
        assert any(f"Speed of {phase}: {speed['images_per_second']:.1f} images/s" in line for line in log[-25:])


def test_the_same_seed_gives_the_same_bytes_in_another_process(config, tmp_path):
    """All of it with pictures, by the command line as a user types it, and once more in this process."""
    flags = ("--KD_method", "KD_Token", "--random_s", 5)
    argv = runs.arguments(config, tmp_path / "a", *flags)
    done = subprocess.run([sys.executable, "run.py", *argv], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"  python -m utils.report {tmp_path}/a\n") and done.stdout.count("Forgetting (p") == 1
    assert len(set(lines := [line for line in done.stdout.splitlines() if line.strip("-")])) == len(lines)
    assert run.main(runs.arguments(config, tmp_path / "b", *flags)) == 0
    assert runs.results(tmp_path / "a") == runs.results(tmp_path / "b")
    assert {"Results/losses.png", "models/task-2/T_class.pth"} <= set(runs.results(tmp_path / "a"))


def test_another_seed_gives_other_results_and_a_shuffled_order_the_same_data(config, tmp_path):
    short = ("--max_task", 1, "--schedule", 1)
    a = runs.finish(config, tmp_path / "a", *short)
    b = runs.finish(config, tmp_path / "b", *short, "--random_s", 2, "--class_order", "shuffled")
    for name in ("Results/metrics.json", "models/task-1/T_class.pth", "models/task-1/S_class.pth"):
        assert runs.results(a)[name] != runs.results(b)[name]
    one, other = (json.loads((folder / "Results/metrics.json").read_text())["data"] for folder in (a, b))
    assert one == other


def test_tensorboard_and_wandb_get_the_same_numbers(config, tmp_path, monkeypatch):
    stand_in = "from unittest.mock import MagicMock; init = SummaryWriter = MagicMock()"
    for name in ("wandb", "tensorboard"):
        (tmp_path / f"{name}.py").write_text(stand_in)
    monkeypatch.syspath_prepend(tmp_path)
    wandb, tensorboard = (importlib.import_module(name) for name in ("wandb", "tensorboard"))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", tensorboard)
    folder = runs.finish(config, tmp_path / "run", "--max_task", 2, "--schedule", 1, "--tensorboard", "--wandb")
    student = json.loads((folder / "Results/metrics.json").read_text())["student"]
    writer = tensorboard.SummaryWriter.return_value.__enter__.return_value
    written = {(name, place): value for name, value, place in (call.args for call in writer.add_scalar.mock_calls)}
    for axis in ("epoch", "task"):
        sent = [call.args[0] for call in wandb.init.return_value.__enter__.return_value.log.mock_calls]
        for numbers in (numbers for numbers in sent if axis in numbers):
            place = numbers.pop(axis)
            assert all(written.pop((name, place)) == value for name, value in numbers.items())
    assert not written
    settings, final = writer.add_hparams.call_args.args
    assert settings["lr"] == 0.01 and settings == {**wandb.init.call_args.kwargs["config"], **settings}
    assert final["final/student/average accuracy"] == pytest.approx(student["final_average_accuracy"])
    assert final["final/student/forgetting"] == pytest.approx(student["forgetting"])
    assert final["final/teacher, accuracy by task/1"] >= 0


def test_settings_are_a_configuration(config, tmp_path):
    """``args.yaml`` of a run starts the same run elsewhere."""
    flags = ("--KD_method", "DKD", "--max_task", 1, "--schedule", 1, "--lr", "3e-3")
    first = runs.finish(config, tmp_path / "a", *flags)
    assert runs.results(runs.finish(first / "args.yaml", tmp_path / "b")) == runs.results(first)


@pytest.mark.parametrize(
    "flags",
    [
        "--memory 4 --DW 1 --train_aug 0 --class_order shuffled --schedule 1 2 --schedule_type decay --validation 1"
        " --batch_size 3 --optimizer RMSprop",
        "--upper_bound_flag 1 --schedule 1 --KD_method none",
    ],
)
def test_usual_options_together(flags, config, tmp_path):
    runs.finish(config, tmp_path / "run", *flags.split())
    classes = json.loads((tmp_path / "run/Results/metrics.json").read_text())["classes"]
    assert classes == ([[0, 4]] if "upper_bound" in flags else [[0, 2], [2, 4]])
