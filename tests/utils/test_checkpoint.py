"""The folder of a run: whole files or none, one owner, settings compared."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from utils.checkpoint import (
    LOCK,
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

ROOT = Path(__file__).parents[2]


def config_of(folder: Path, **settings) -> Config:
    return Config(log_dir=folder, **settings)


class TestWriting:
    def test_a_new_file_replaces_the_old_one(self, tmp_path):
        for data in (b"old", b"new"):
            write_atomic(tmp_path / "a/b", data)
            assert (tmp_path / "a/b").read_bytes() == data
        assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]

    @pytest.mark.parametrize("operation", ["fsync", "replace"])
    def test_an_error_leaves_the_old_file(self, operation, tmp_path, monkeypatch):
        def fail(*_):
            raise OSError(28, "No space left on device")

        write_atomic(tmp_path / "file", b"old")
        monkeypatch.setattr(os, operation, fail)
        with pytest.raises(RunFolderError, match="cannot write .*file: No space left on device"):
            write_atomic(tmp_path / "file", b"new")
        assert (tmp_path / "file").read_bytes() == b"old"

    def test_a_file_that_grows_too_large_leaves_nothing(self, tmp_path):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        try:
            with pytest.raises(RunFolderError, match="File too large"):
                write_atomic(tmp_path / "file", bytes(2000))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert list(tmp_path.iterdir()) == []

    def test_tensors_come_back_and_equal_states_give_equal_bytes(self):
        state = {"a": [torch.arange(3), {"b": torch.tensor(1.5)}], "c": 1, 5: "text"}
        assert to_bytes(state) == to_bytes(from_bytes(to_bytes(state)))
        with pytest.raises(RunFolderError, match="no file of tensors"):
            from_bytes(b"something else")


class TestStates:
    def test_the_newest_one_counts_and_the_one_before_it_is_kept(self, tmp_path):
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

    def test_a_flipped_bit_is_noticed(self, tmp_path):
        folder = RunFolder(tmp_path)
        folder.save_state(to_bytes({"weights": torch.ones(1000)}))
        data = bytearray((tmp_path / STATE).read_bytes())
        data[len(data) // 2] ^= 1
        (tmp_path / STATE).write_bytes(data)
        with pytest.raises(RunFolderError, match="damaged"):
            folder.load_state()


class TestOwnership:
    def test_one_process_at_a_time(self, tmp_path):
        script = (
            "from pathlib import Path; from utils.checkpoint import open_run; from utils.config import Config\n"
            f"with open_run(Config(log_dir=Path({str(tmp_path / 'run')!r}))): pass"
        )

        def other():
            return subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)

        (tmp_path / "run").mkdir()
        with open_run(config_of(tmp_path / "run")):
            assert f"in use by process {os.getpid()} on " in other().stderr
            assert (tmp_path / "run" / LOCK).exists()
        assert not (tmp_path / "run" / LOCK).exists()
        (tmp_path / "run" / LOCK).write_text("process 1 on a machine that has crashed")
        assert other().returncode == 0

    def test_a_forked_worker_does_not_keep_the_lock(self, tmp_path):
        (tmp_path / "run").mkdir()
        with open_run(config_of(tmp_path / "run")):
            worker = os.fork()
            if worker == 0:
                threading.Event().wait(30)
                os._exit(0)
        try:
            with open_run(config_of(tmp_path / "run")):
                pass
        finally:
            os.kill(worker, 9)
            os.waitpid(worker, 0)

    def test_folders_of_a_run_that_does_not_start_are_gone_again(self, tmp_path):
        with pytest.raises(ZeroDivisionError), open_run(config_of(tmp_path / "a/b/c")) as folder:
            (folder.root / "output.log").write_text("started")
            raise ZeroDivisionError
        assert list(tmp_path.iterdir()) == []

    def test_the_current_folder_is_not_moved(self, tmp_path, monkeypatch):
        for name in ("args.yaml", "classes.json"):
            (tmp_path / name).touch()
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ConfigError, match="because it is the current folder"):
            with open_run(config_of(Path("."), overwrite=True)):
                pass
        assert sorted(path.name for path in tmp_path.iterdir()) == ["args.yaml", "classes.json"]

    def test_unfinished_files_of_a_killed_process_are_removed(self, tmp_path):
        (tmp_path / ".classes.json.unfinished").touch()
        with open_run(config_of(tmp_path)):
            assert [path.name for path in tmp_path.iterdir()] == [LOCK]
