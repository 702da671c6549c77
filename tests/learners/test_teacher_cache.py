"""``--teacher_from``: another run's teachers give the results that training them gives."""

import json
import shutil

import pytest
from PIL import Image

import run
from learners.trainer import Trainer
from tests import runs
from utils.checkpoint import METRICS


@pytest.fixture(scope="module")
def folders(config, tmp_path_factory):
    """A finished run with KD, one with KD_Token, one without a teacher."""
    root = tmp_path_factory.mktemp("runs")
    for method in ("KD", "KD_Token", "none"):
        runs.finish(config, root / method, "--KD_method", method)
    return root


@pytest.fixture(scope="module")
def expected(folders):
    return runs.results(folders / "KD_Token")


@pytest.fixture
def source(folders, tmp_path):
    """A copy of the run with KD, to be changed."""
    return shutil.copytree(folders / "KD", tmp_path / "KD")


@pytest.fixture
def trained(monkeypatch):
    """(task, role) of everything that is trained."""
    trainings, real = [], Trainer._train

    def train(self, start, state):
        trainings.append((start.task, start.role))
        return real(self, start, state)

    monkeypatch.setattr(Trainer, "_train", train)
    return trainings


@pytest.fixture
def start(config, tmp_path):
    """Start a run with another run's teachers; returns the exit code."""
    flags = ("--KD_method", "KD_Token", "--teacher_from")
    with runs.quick():
        yield lambda source, *more: run.main(runs.arguments(config, tmp_path / "run", *flags, source, *more))


def test_same_results_without_training_the_teacher(start, folders, expected, tmp_path, trained, caplog):
    assert start(folders / "KD") == 0
    assert runs.results(tmp_path / "run") == expected
    assert trained == [(0, "student"), (1, "student")]
    assert "Task 1/2: teacher taken from" in caplog.text and "nan" not in caplog.text


def test_a_student_learns_from_the_prompts_merged_before_its_task(config, tmp_path, trained):
    """APT's teacher of a task holds them merged after it; the resumed run, too, merges once."""
    apt = ("--learner_name", "APT", "--prompt_param", 0.01, "--KD_method")
    teachers = runs.finish(config, tmp_path / "teachers", *apt, "KD")
    expected = runs.results(runs.finish(config, tmp_path / "expected", *apt, "KD_Token"))
    trained.clear()
    folder = runs.finish(config, tmp_path / "run", *apt, "KD_Token", "--teacher_from", teachers)
    assert trained == [(0, "student"), (1, "student")]
    assert runs.results(folder) == expected


@pytest.mark.parametrize("second", ["missing", "being written"])
def test_teachers_that_are_damaged_or_not_there_yet(second, start, source, expected, tmp_path, trained, caplog):
    """A run writes the models of a task before the results that have their losses."""
    (source / "models/task-1/T_class.pth").write_bytes(b"no model")
    if second == "missing":
        (source / "models/task-2/T_class.pth").unlink()
    else:
        metrics = json.loads((source / METRICS).read_text())
        (source / METRICS).write_text(json.dumps(metrics | {"tasks_done": 1}))
    assert start(source) == 0
    assert trained == [(0, "teacher"), (0, "student"), (1, "teacher"), (1, "student")]
    assert "T_class.pth is damaged" in caplog.text
    assert runs.results(tmp_path / "run") == expected


@pytest.mark.parametrize("stop_at", [(1, "student", 0), (1, "teacher", 1)])
def test_a_resume_may_take_teachers_or_train_them(stop_at, config, folders, expected, tmp_path, monkeypatch):
    """Stopped at an epoch of the second task with the flag and resumed without it, or the other way round."""
    real = Trainer._train_epoch

    def train_epoch(self, training, here, *more):
        if here[:3] == stop_at:
            raise runs.Killed
        real(self, training, here, *more)

    flags = ("--teacher_from", folders / "KD")
    first, then = (flags, ()) if stop_at[1] == "student" else ((), flags)
    command = (config, tmp_path / "run", "--KD_method", "KD_Token")
    with monkeypatch.context() as patched, pytest.raises(runs.Killed):
        patched.setattr(Trainer, "_train_epoch", train_epoch)
        runs.finish(*command, *first)
    assert runs.results(runs.finish(*command, *then)) == expected


@pytest.mark.parametrize(
    ("source", "flags", "words"),
    [
        ("KD", ("--lr", "0.02"), "were trained with other settings (lr 0.01 there, 0.02 here)"),
        ("none", (), "has no teacher (--KD_method none); name another run"),
        ("nowhere", (), "there is no folder"),
        (".", (), "args.yaml cannot be read"),
        ("KD", ("--KD_method", "none"), "--KD_method none has no teacher; leave one of them out"),
    ],
)
def test_other_teachers_are_refused(source, flags, words, start, folders, tmp_path, capsys):
    assert start(folders / source, *flags) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_teachers_of_other_data_and_of_the_run_itself_are_refused(start, config, source, folders, tmp_path, capsys):
    info = json.loads((source / "classes.json").read_text())
    info["backbone_sha256"]["teacher"] = "0" * 64
    (source / "classes.json").write_text(json.dumps(info))
    assert start(source) == 2
    assert "trained on other data or backbones (backbone_sha256 differ)" in capsys.readouterr().err
    images = shutil.copytree(config.parent / "images", tmp_path / "images")
    Image.new("RGB", (16, 16)).save(images / "val/class 0/1.png")
    assert start(folders / "KD", "--dataroot", images) == 2
    assert "(images_sha256 differ)" in capsys.readouterr().err
    own = shutil.copytree(folders / "KD_Token", tmp_path / "run")
    (own / METRICS).unlink()
    assert start(own) == 2
    assert "is the log_dir of this run itself; name another run" in capsys.readouterr().err
