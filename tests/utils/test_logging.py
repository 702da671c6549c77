import logging
import subprocess
import sys

import pytest

import utils.logging as cdl_logging
from utils.logging import Progress, duration, environment, open_tensorboard, peak_memory_mb, setup_logging


@pytest.fixture
def log(tmp_path):
    """Set up as a run does; afterwards the root logger is as before."""
    root = logging.getLogger()
    before = list(root.handlers)
    yield setup_logging(tmp_path / "output.log")
    for handler in [h for h in root.handlers if h not in before]:
        root.removeHandler(handler)
        handler.close()


def text(tmp_path):
    return (tmp_path / "output.log").read_text(encoding="utf-8")


def test_console_is_plain_and_file_has_timestamps(log, tmp_path, capsys):
    log.info("hello")
    log.debug("only for the file")
    log.warning("mind this")
    logging.getLogger("learners.trainer").info("from a module")
    logging.getLogger("some.other.package").info("noise")
    assert capsys.readouterr().out == "hello\nWARNING: mind this\nfrom a module\n"
    lines = text(tmp_path).splitlines()
    assert [line[21:] for line in lines] == ["hello", "only for the file", "WARNING: mind this",
                                             "from a module"]
    assert lines[0][:2] == "20" and lines[0][19:21] == "  "


def test_second_set_up_appends_and_does_not_double(log, tmp_path, capsys):
    log.info("first")
    setup_logging(tmp_path / "output.log").info("second")
    assert capsys.readouterr().out == "first\nsecond\n"
    assert [line[21:] for line in text(tmp_path).splitlines()] == ["first", "second"]


def test_other_processes_of_a_distributed_run_are_silent(log, tmp_path, capsys):
    other = setup_logging(tmp_path / "other.log", main=False)
    other.info("hello")
    other.warning("trouble")
    assert capsys.readouterr().out == "WARNING: trouble\n"
    assert not (tmp_path / "other.log").exists()


def test_environment():
    found = environment()
    assert found["versions"]["torch"] and found["versions"]["python"] == sys.version.split()[0]
    assert found["hardware"]["cores"] >= 1 and found["hardware"]["cpu"]
    assert isinstance(found["hardware"]["gpus"], list)


def test_git_commit(tmp_path):
    assert cdl_logging._git_commit(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    try:
        subprocess.run([*git, "init", "-q"], check=True)
    except FileNotFoundError:
        pytest.skip("git is not installed")
    assert cdl_logging._git_commit(tmp_path) is None  # no commit yet
    (tmp_path / "file").write_text("1")
    subprocess.run([*git, "add", "file"], check=True)
    subprocess.run([*git, "commit", "-qm", "one"], check=True)
    commit = cdl_logging._git_commit(tmp_path)
    assert len(commit) == 40
    (tmp_path / "file").write_text("2")
    assert cdl_logging._git_commit(tmp_path) == f"{commit}-dirty"
    inner = tmp_path / "inner"
    inner.mkdir()
    assert cdl_logging._git_commit(inner) is None  # somebody else's checkout


def test_peak_memory():
    assert 10 < peak_memory_mb()["cpu"] < 1e6


def test_missing_tensorboard_is_a_clear_error(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match="--tensorboard needs the package tensorboard"):
        open_tensorboard(tmp_path)
    assert not list(tmp_path.iterdir())


def test_tensorboard_writes(tmp_path):
    pytest.importorskip("tensorboard")
    writer = open_tensorboard(tmp_path)
    writer.add_scalar("loss", 1.0, 0)
    writer.close()
    assert list(tmp_path.iterdir())


def test_duration():
    assert [duration(0), duration(59.6), duration(3723)] == ["0:00:00", "0:01:00", "1:02:03"]


def run(progress, tasks=2, epochs=3, steps=2, start=0):
    for task in range(start, tasks):
        for phase in ("teacher", "student"):
            progress.start_phase(task, phase, epochs, 0)
            for epoch in range(epochs):
                progress.start_epoch(epoch, steps)
                for _ in range(steps):
                    progress.step(16)
                progress.update(0.5, 75.0)
                progress.end_epoch()
            progress.end_phase()
    progress.close()


def test_lines_one_a_phase_on_the_console_one_an_epoch_in_the_file(log, tmp_path, capsys):
    run(Progress(False, 2))
    out = capsys.readouterr()
    assert len(out.out.splitlines()) == 4 and out.err == ""
    assert out.out.startswith("Task 1/2 teacher: loss 0.5000, train accuracy 75.00 %, ")
    assert "left" in out.out
    assert out.out.splitlines()[-1].endswith("0:00:00 left")
    assert len(text(tmp_path).splitlines()) == 4 + 2 * 2 * 3
    assert "Task 2/2 student epoch 3/3: loss 0.5000" in text(tmp_path)


def test_long_phases_say_where_they_are(log, monkeypatch, capsys):
    monkeypatch.setattr(cdl_logging, "QUIET_SECONDS", 0.0)
    run(Progress(False, 1), tasks=1)
    out = capsys.readouterr().out
    assert "Task 1/1 teacher epoch 1/3 batch 2/2: loss 0.5000" in out
    assert len(out.splitlines()) == 2 * (1 + 3 + 3)


def test_no_bars_without_a_terminal(log, capsys):
    run(Progress(None, 1), tasks=1)
    assert capsys.readouterr().err == ""


def test_bars(log, capsys):
    run(Progress(True, 2))
    out = capsys.readouterr()
    for word in ("tasks", "phases", "epochs", "batches", "loss 0.5000", "images/s", "left"):
        assert word in out.err
    assert out.out.count("\n") == 4  # the lines of the phases stay when the bars are gone


def test_time_left_counts_from_where_a_resumed_run_started(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(cdl_logging.time, "monotonic", lambda: now[0])
    progress = Progress(False, 4, phases=1)
    progress.start_phase(2, "student", 10, 5)  # 2.5 of 4 tasks were done before
    assert progress._left() == "time left unknown"
    progress.start_epoch(5, 1)
    progress.step(1)
    now[0] = 10.0
    progress.end_epoch()  # 0.1 task in 10 s: the other 1.4 take 140 s
    assert progress._left() == "0:02:20 left"
