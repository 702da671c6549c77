"""``--teacher_from``: another run's teachers give the results that training them gives."""

import json
import shutil
from types import SimpleNamespace

import pytest

import run
from learners import teachers
from learners.trainer import Trainer
from tests import runs
from utils.checkpoint import RunFolder


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
    """(task, role) of every phase that is trained."""
    phases, real = [], Trainer._run_phase

    def run_phase(self, start, name, state):
        phases.append((start.task, name))
        real(self, start, name, state)

    monkeypatch.setattr(Trainer, "_run_phase", run_phase)
    return phases


def start(config, folder, source, *flags) -> int:
    with runs.quick():
        return run.main(runs.arguments(config, folder, "--KD_method", "KD_Token", "--teacher_from", source, *flags))


def test_same_results_without_training_the_teacher(config, folders, tmp_path, trained, caplog):
    assert start(config, tmp_path / "run", folders / "KD") == 0
    assert runs.results(tmp_path / "run") == runs.results(folders / "KD_Token")
    assert trained == [(0, "student"), (1, "student")]
    assert "Task 1/2: teacher taken from" in caplog.text and "nan" not in caplog.text


def test_a_teacher_that_is_not_there_yet_or_damaged_is_trained(config, folders, tmp_path, trained, caplog):
    with runs.quick():
        assert run.main(runs.arguments(config, tmp_path / "short", "--KD_method", "KD", "--max_task", "1")) == 0
    trained.clear()
    assert start(config, tmp_path / "run", tmp_path / "short") == 0
    assert trained == [(0, "student"), (1, "teacher"), (1, "student")]
    assert runs.results(tmp_path / "run") == runs.results(folders / "KD_Token")

    shutil.copytree(folders / "KD", tmp_path / "damaged")
    (tmp_path / "damaged/models/task-1/T_class.pth").write_bytes(b"no model")
    trained.clear()
    assert start(config, tmp_path / "other", tmp_path / "damaged") == 0
    assert trained == [(0, "teacher"), (0, "student"), (1, "student")]
    assert "T_class.pth is damaged or missing" in caplog.text
    assert runs.results(tmp_path / "other") == runs.results(folders / "KD_Token")


def test_a_resume_may_do_without(config, folders, tmp_path, monkeypatch):
    class Stop(BaseException):
        pass

    real = Trainer._run_epoch

    def stop_in_the_second_task(self, phase, name, here, meter):
        if here.task == 1:
            raise Stop
        real(self, phase, name, here, meter)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_run_epoch", stop_in_the_second_task)
        with pytest.raises(Stop):
            start(config, tmp_path / "run", folders / "KD")
    with runs.quick():
        assert run.main(runs.arguments(config, tmp_path / "run", "--KD_method", "KD_Token")) == 0
    assert runs.results(tmp_path / "run") == runs.results(folders / "KD_Token")


def test_resume_within_the_teachers_phase(config, folders, tmp_path, trained, monkeypatch):
    class Stop(BaseException):
        pass

    real = Trainer._run_epoch

    def stop_in_the_second_epoch(self, phase, name, here, meter):
        if (here.task, name, here.epoch) == (1, "teacher", 1):
            raise Stop
        real(self, phase, name, here, meter)

    with monkeypatch.context() as patched, runs.quick():
        patched.setattr(Trainer, "_run_epoch", stop_in_the_second_epoch)
        with pytest.raises(Stop):
            run.main(runs.arguments(config, tmp_path / "run", "--KD_method", "KD_Token"))
    trained.clear()
    assert start(config, tmp_path / "run", folders / "KD") == 0
    assert trained == [(1, "student")]
    assert runs.results(tmp_path / "run") == runs.results(folders / "KD_Token")


def test_a_run_that_is_just_committing_is_read_again(config, folders, tmp_path, trained, monkeypatch):
    shutil.copytree(folders / "KD", tmp_path / "KD")
    model = tmp_path / "KD/models/task-1/T_class.pth"
    model.rename(tmp_path / "on its way")
    pauses = []

    def arrive(seconds):
        pauses.append(seconds)
        (tmp_path / "on its way").rename(model)

    monkeypatch.setattr(teachers, "time", SimpleNamespace(sleep=arrive))
    assert start(config, tmp_path / "run", tmp_path / "KD", "--max_task", "1") == 0
    assert trained == [(0, "student")] and len(pauses) == 1


def test_another_run_in_the_folder_meanwhile_is_noticed(config, folders, tmp_path, trained, monkeypatch, caplog):
    shutil.copytree(folders / "KD", tmp_path / "KD")
    real = teachers.TrainedTeachers.find

    def find(self, task):
        if task == 1:
            folder = RunFolder(self.root)
            folder.open()
            metrics = json.loads(folder.read("Results/metrics.json"))
            metrics["settings"]["random_s"] = 2
            folder.commit({"Results/metrics.json": json.dumps(metrics).encode()}, complete=True)
        return real(self, task)

    monkeypatch.setattr(teachers.TrainedTeachers, "find", find)
    assert start(config, tmp_path / "run", tmp_path / "KD") == 0
    assert trained == [(0, "student"), (1, "teacher"), (1, "student")]
    assert "now holds another run than it did" in caplog.text
    assert runs.results(tmp_path / "run") == runs.results(folders / "KD_Token")


def test_a_run_does_not_take_from_itself(config, folders, tmp_path, capsys):
    shutil.copytree(folders / "KD_Token", tmp_path / "run")
    before = runs.snapshot(tmp_path / "run")
    assert start(config, tmp_path / "run", tmp_path / "run", "--overwrite", "1") == 2
    assert "is the log_dir of this run itself; name another run" in capsys.readouterr().err
    assert runs.snapshot(tmp_path / "run") == before


def test_seeds_take_from_seeds(config, tmp_path, trained):
    with runs.quick():
        assert run.main(runs.arguments(config, tmp_path / "KD", "--KD_method", "KD", "--repeat", "2")) == 0
    trained.clear()
    assert start(config, tmp_path / "run", tmp_path / "KD", "--repeat", "2") == 0
    assert {role for _, role in trained} == {"student"} and len(trained) == 4


@pytest.mark.parametrize("source, flags, words", [
    ("KD", ("--lr", "0.02"), "were trained with other settings (lr 0.01 there, 0.02 here)"),
    ("KD", ("--random_s", "2"), "random_s 1 there, 2 here"),
    ("none", (), "has no teacher (--KD_method none); name another run"),
    ("nowhere", (), "there is no folder"),
    (".", (), "args.yaml is not among the files of this run"),
    ("KD", ("--KD_method", "none"), "--KD_method none has no teacher; leave one of them out"),
])  # fmt: skip
def test_other_teachers_are_refused(source, flags, words, config, folders, tmp_path, capsys):
    assert start(config, tmp_path / "run", folders / source, *flags) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_teachers_of_other_data_are_refused(config, folders, tmp_path, capsys):
    shutil.copytree(folders / "KD", tmp_path / "KD")
    facts = json.loads((tmp_path / "KD/classes.json").read_text())
    facts["backbone_sha256"]["teacher"] = "0" * 64
    folder = RunFolder(tmp_path / "KD")
    folder.open()
    folder.commit({"classes.json": json.dumps(facts).encode()}, complete=True)
    assert start(config, tmp_path / "run", tmp_path / "KD") == 2
    assert "trained on other data or backbones (backbone_sha256 differ)" in capsys.readouterr().err
