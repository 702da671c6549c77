"""The folder of a run: whole files or none, one owner, two states."""

import os
import threading
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from tests import runs
from utils.checkpoint import (
    LOCK,
    LOG,
    PREVIOUS_STATE,
    STATE,
    RunFolder,
    RunFolderError,
    from_bytes,
    open_run,
    to_bytes,
    write_atomic,
)
from utils.config import Config, ConfigError


@pytest.mark.parametrize("operation", ["fsync", "replace"])
def test_a_new_file_replaces_the_old_one_or_leaves_it(operation, tmp_path, monkeypatch):
    for data in (b"old", b"new"):
        write_atomic(tmp_path / "a/b", data)
        assert (tmp_path / "a/b").read_bytes() == data
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]
    error = OSError(28, "No space left on device")
    monkeypatch.setattr(os, operation, Mock(side_effect=error))
    with pytest.raises(RunFolderError, match="cannot write .*b: No space left on device"):
        write_atomic(tmp_path / "a/b", b"newest")
    assert (tmp_path / "a/b").read_bytes() == b"new"


def test_tensors_come_back_and_equal_states_give_equal_bytes():
    state = {"a": [torch.arange(3), {"b": torch.tensor(1.5)}], "c": 1, 5: "text"}
    assert to_bytes(state) == to_bytes(from_bytes(to_bytes(state)))
    with pytest.raises(RunFolderError, match="not a file of tensors"):
        from_bytes(b"something else")


def test_the_newest_state_counts_and_the_one_before_it_is_kept(tmp_path):
    folder = RunFolder(tmp_path)
    assert folder.load_state() is None
    for number in range(4):
        folder.save_state(to_bytes({"number": number}))
        assert folder.load_state() == {"number": number}
    assert sorted(path.name for path in (tmp_path / "state").iterdir()) == ["newest.pth", "previous.pth"]
    (tmp_path / STATE).write_bytes(b"damaged")
    assert folder.load_state() == {"number": 2}
    (tmp_path / STATE).unlink()  # killed between two renames
    assert folder.load_state() == {"number": 2}
    (tmp_path / PREVIOUS_STATE).write_bytes(to_bytes({"number": 2})[:-3])
    with pytest.raises(RunFolderError, match="no state to resume from: .*previous.pth is damaged"):
        folder.load_state()


def test_one_process_at_a_time(tmp_path):
    script = "from pathlib import Path; from utils.checkpoint import open_run; from utils.config import Config\n"
    script += f"with open_run(Config(log_dir=Path({str(tmp_path)!r}))): pass"
    with open_run(Config(log_dir=tmp_path)):
        assert f"in use by process {os.getpid()} on " in runs.python(script).stderr
        assert (tmp_path / LOCK).exists()
    assert not (tmp_path / LOCK).exists()
    (tmp_path / LOCK).write_text("process 1 on a machine that has crashed")
    assert runs.python(script).returncode == 0


@pytest.mark.parametrize("name", [LOCK, LOG])
def test_links_are_not_followed(name, tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(tmp_path / "mine")
    with pytest.raises(ConfigError, match=f"symbolic links: .*{name}.*choose another folder"):
        open_run(Config(log_dir=tmp_path / "run")).__enter__()
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_forked_worker_does_not_keep_the_lock(tmp_path):
    with open_run(Config(log_dir=tmp_path)):
        worker = os.fork()
        if worker == 0:
            threading.Event().wait(30)
            os._exit(0)
    try:
        with open_run(Config(log_dir=tmp_path)):
            pass
    finally:
        os.kill(worker, 9)
        os.waitpid(worker, 0)


def test_the_current_folder_is_not_moved(tmp_path, monkeypatch):
    for name in ("args.yaml", "classes.json"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="because it is the current folder"):
        open_run(Config(log_dir=Path("."), overwrite=True)).__enter__()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["args.yaml", "classes.json"]


def test_unfinished_files_of_a_killed_process_are_removed(tmp_path):
    (tmp_path / ".classes.json.unfinished").touch()
    with open_run(Config(log_dir=tmp_path)):
        assert {path.name for path in tmp_path.iterdir()} == {LOCK, LOG}
