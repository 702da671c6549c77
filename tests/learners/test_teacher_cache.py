"""``--teacher_from``: another run's teachers give the results that training them gives."""

from __future__ import annotations

import json
import shutil

import pytest

import run
from learners.teacher_cache import TeacherCache
from learners.trainer import Trainer
from tests import runs
from utils.checkpoint import METRICS


@pytest.fixture(scope="module")
def folders(config, tmp_path_factory):
    """A finished run with KD, one with KD_Token, one without a teacher."""
    root = tmp_path_factory.mktemp("runs")
    for method in ("KD", "KD_Token", "none"):
        with runs.quick():
            assert run.main(runs.arguments(config, root / method, "--KD_method", method)) == 0
    return root


@pytest.fixture
def trained(monkeypatch):
    """(task, role) of everything that is trained."""
    trainings, real = [], Trainer._train

    def train(self, start, state):
        trainings.append((start.task, start.role))
        return real(self, start, state)

    monkeypatch.setattr(Trainer, "_train", train)
    return trainings


def start(config, folder, source, *flags) -> int:
    with runs.quick():
        return run.main(runs.arguments(config, folder, "--KD_method", "KD_Token", "--teacher_from", source, *flags))


def test_same_results_without_training_the_teacher(config, folders, tmp_path, trained, caplog):
    assert start(config, tmp_path / "run", folders / "KD") == 0
    assert runs.results(tmp_path / "run") == runs.results(folders / "KD_Token")
    assert trained == [(0, "student"), (1, "student")]
    assert "Task 1/2: teacher taken from" in caplog.text and "nan" not in caplog.text


def test_a_teacher_that_is_not_there_yet_or_damaged_is_trained(config, folders, tmp_path, trained, caplog):
    source = shutil.copytree(folders / "KD", tmp_path / "KD")
    (source / "models/task-1/T_class.pth").write_bytes(b"no model")
    (source / "models/task-2/T_class.pth").unlink()
    assert start(config, tmp_path / "run", source) == 0
    assert trained == [(0, "teacher"), (0, "student"), (1, "teacher"), (1, "student")]
    assert "T_class.pth is damaged" in caplog.text
    assert runs.results(tmp_path / "run") == runs.results(folders / "KD_Token")


def test_a_run_that_is_writing_its_results_is_left_alone(config, folders, tmp_path, trained):
    """Its models of a task come before the results that have their losses."""
    source = shutil.copytree(folders / "KD", tmp_path / "KD")
    metrics = json.loads((source / METRICS).read_text()) | {"tasks_done": 1}
    (source / METRICS).write_text(json.dumps(metrics))
    assert start(config, tmp_path / "run", source) == 0
    assert trained == [(0, "student"), (1, "teacher"), (1, "student")]


@pytest.mark.parametrize("stop_at", [(1, "student", 0), (1, "teacher", 1)])
def test_a_resume_may_take_teachers_or_train_them(stop_at, config, folders, tmp_path, monkeypatch):
    """Stopped at an epoch of the second task with the flag and resumed without it, or the other way round."""
    real = Trainer._train_epoch

    def train_epoch(self, training, here, meter):
        if here[:3] == stop_at:
            raise runs.Killed
        real(self, training, here, meter)

    flags = ("--teacher_from", folders / "KD")
    first, then = (flags, ()) if stop_at[1] == "student" else ((), flags)
    command = runs.arguments(config, tmp_path / "run", "--KD_method", "KD_Token")
    with runs.quick():
        with monkeypatch.context() as patched, pytest.raises(runs.Killed):
            patched.setattr(Trainer, "_train_epoch", train_epoch)
            run.main([*command, *map(str, first)])
        assert run.main([*command, *map(str, then)]) == 0
    assert runs.results(tmp_path / "run") == runs.results(folders / "KD_Token")


def test_another_run_in_the_folder_meanwhile_is_noticed(config, folders, tmp_path, trained, monkeypatch, caplog):
    source = shutil.copytree(folders / "KD", tmp_path / "KD")
    real = TeacherCache.find

    def find(self, task):
        if task == 1:
            metrics = json.loads((source / METRICS).read_text())
            metrics["settings"]["random_s"] = 2
            (source / METRICS).write_text(json.dumps(metrics))
        return real(self, task)

    monkeypatch.setattr(TeacherCache, "find", find)
    assert start(config, tmp_path / "run", source) == 0
    assert trained == [(0, "student"), (1, "teacher"), (1, "student")]
    assert "now holds another run than it did" in caplog.text
    assert runs.results(tmp_path / "run") == runs.results(folders / "KD_Token")


def test_seeds_take_from_seeds(config, tmp_path, trained):
    with runs.quick():
        assert run.main(runs.arguments(config, tmp_path / "KD", "--KD_method", "KD", "--repeat", "2")) == 0
    trained.clear()
    assert start(config, tmp_path / "run", tmp_path / "KD", "--repeat", "2") == 0
    assert {role for _, role in trained} == {"student"} and len(trained) == 4


@pytest.mark.parametrize(
    ("source", "flags", "words"),
    [
        ("KD", ("--lr", "0.02"), "were trained with other settings (lr 0.01 there, 0.02 here)"),
        ("KD", ("--random_s", "2"), "random_s 1 there, 2 here"),
        ("none", (), "has no teacher (--KD_method none); name another run"),
        ("nowhere", (), "there is no folder"),
        (".", (), "args.yaml cannot be read"),
        ("KD", ("--KD_method", "none"), "--KD_method none has no teacher; leave one of them out"),
        ("KD", ("--first_split_size", "1"), "first_split_size 2 there, 1 here"),
    ],
)
def test_other_teachers_are_refused(source, flags, words, config, folders, tmp_path, capsys):
    assert start(config, tmp_path / "run", folders / source, *flags) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_teachers_of_other_data_and_of_the_run_itself_are_refused(config, folders, tmp_path, capsys):
    source = shutil.copytree(folders / "KD", tmp_path / "KD")
    info = json.loads((source / "classes.json").read_text())
    info["backbone_sha256"]["teacher"] = "0" * 64
    (source / "classes.json").write_text(json.dumps(info))
    assert start(config, tmp_path / "run", source) == 2
    assert "trained on other data or backbones (backbone_sha256 differ)" in capsys.readouterr().err

    own = shutil.copytree(folders / "KD_Token", tmp_path / "own")
    (own / METRICS).unlink()
    assert start(config, own, own) == 2
    assert "is the log_dir of this run itself; name another run" in capsys.readouterr().err
