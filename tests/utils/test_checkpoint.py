"""Files of a run: whole or not at all, whatever happens, and owned by one process."""

import errno
import fcntl
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from utils import checkpoint
from utils.checkpoint import (
    LOCK,
    MANIFEST,
    STATES,
    RunFolder,
    RunFolderBusyError,
    RunFolderError,
    RunLock,
    from_bytes,
    to_bytes,
    write_atomic,
)

OLD = {"args.yaml": b"old", "models/task-1/S_class.pth": b"old model", "Results/acc.csv": b"1\n"}
NEW = {"models/task-1/S_class.pth": b"new model", "Results/acc.csv": b"2\n", "Results/new.csv": b"3\n"}


class Killed(BaseException):
    """The process would be gone now."""


class Death:
    """Lets a process die at its ``after``-th operation on files: that one and all later ones do not happen."""

    def __init__(self, monkeypatch, after: int, *, half: bool = False):
        self.left = after
        self.half = half
        self.dead = False
        monkeypatch.setattr(os, "fsync", lambda _: None)  # takes time, and changes nothing but after a power cut
        for owner, name in ((os, "replace"), (os, "fsync"), (os, "unlink"), (os, "rename")):
            monkeypatch.setattr(owner, name, self._mortal(getattr(owner, name)))
        monkeypatch.setattr(Path, "unlink", self._mortal(Path.unlink))
        self._write = checkpoint._write_beside
        monkeypatch.setattr(checkpoint, "_write_beside", self._write_beside)

    def _live(self):
        self.left -= 1
        if self.left < 0:
            self.dead = True
            raise Killed

    def _mortal(self, function):
        def mortal(*args, **kwargs):
            self._live()
            return function(*args, **kwargs)

        return mortal

    def _write_beside(self, path, data):
        if self.half and self.left == 1:  # dies while it writes
            self._write(path, data[: len(data) // 2])
            raise Killed
        self._live()
        self._write(path, data)


def reopened(root) -> RunFolder:
    folder = RunFolder(root)
    folder.open()
    return folder


def contents(folder: RunFolder) -> dict[str, bytes]:
    return {name: folder.read(name) for name in folder.files}


def files_of(root) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.open()
    folder.commit(OLD)
    return folder


class TestCommit:
    def test_files_and_manifest(self, folder):
        folder.commit(NEW)
        assert contents(reopened(folder.root)) == {**OLD, **NEW}
        assert files_of(folder.root) == {*OLD, *NEW, MANIFEST}
        assert not folder.complete

    @pytest.mark.parametrize("half", [False, True])
    def test_killed_at_any_moment_old_or_new(self, folder, monkeypatch, half):
        copy, outcomes = folder.root.with_name("copy"), []
        for after in range(100):
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(folder.root, copy)
            victim = reopened(copy)
            with monkeypatch.context() as patch:
                death = Death(patch, after, half=half)
                try:
                    victim.commit(NEW)
                except Killed:
                    death.dead = True
                if not death.dead:
                    break
            read_only = RunFolder(copy)
            read_only.open(read_only=True)
            found = contents(read_only)
            assert found in (OLD, {**OLD, **NEW}), f"killed at operation {after}"
            outcomes.append(found == OLD)
            survivor = reopened(copy)
            assert contents(survivor) == found
            assert files_of(copy) == {*found, MANIFEST}
            survivor.commit(NEW)
            assert contents(reopened(copy)) == {**OLD, **NEW}
        assert after > 10 and outcomes == sorted(outcomes, reverse=True)  # the old files until a moment, then the new
        assert True in outcomes and (half or False in outcomes)

    def test_states_take_turns(self, folder):
        for number in range(5):
            folder.commit_state(b"%d" % number, ["args.yaml"])
            assert next(iter(folder.states)) == STATES[number % 2]
            assert reopened(folder.root).newest_state() == (b"%d" % number, [])
        assert len(folder.states) == 2
        folder.commit(NEW, complete=True)
        assert reopened(folder.root).complete
        assert reopened(folder.root).newest_state() == (b"4", [])
        assert {*STATES} & files_of(folder.root) == {STATES[0]}

    def test_going_on_makes_it_incomplete(self, folder):
        folder.commit_state(b"0")
        folder.commit({}, complete=True)
        folder.commit_state(b"1")
        assert not reopened(folder.root).complete
        assert reopened(folder.root).newest_state() == (b"1", [])

    def test_leaves_others_files_alone(self, folder):
        foreign = {"notes.txt", "other/.args.yaml.unfinished", ".notes.tmp", "Results/mine.txt", "state/mine"}
        for name in foreign:
            (folder.root / name).parent.mkdir(exist_ok=True)
            (folder.root / name).write_text("mine")
        folder.commit_state(b"0")
        folder.commit(NEW, complete=True)
        reopened(folder.root)
        assert foreign <= files_of(folder.root)
        assert all((folder.root / name).read_text() == "mine" for name in foreign)


class TestDamage:
    def test_older_state_is_used(self, folder):
        folder.commit_state(b"first")
        folder.commit_state(b"second")
        (folder.root / STATES[1]).write_bytes(b"damaged")
        data, problems = reopened(folder.root).newest_state()
        assert data == b"first" and len(problems) == 1 and "state/b" in problems[0]

    def test_state_that_needs_a_damaged_file_is_not_used(self, folder):
        folder.commit_state(b"first")
        folder.commit_state(b"second", ["models/task-1/S_class.pth"])
        (folder.root / "models/task-1/S_class.pth").unlink()
        data, problems = reopened(folder.root).newest_state()
        assert data == b"first" and "S_class.pth" in problems[0]

    def test_swapped_states_are_both_refused(self, folder):
        folder.commit_state(b"first")
        folder.commit_state(b"second")
        (folder.root / STATES[0]).write_bytes(b"second")
        (folder.root / STATES[1]).write_bytes(b"first")
        with pytest.raises(RunFolderError, match="no state to go on from.*state/b.*state/a.*--overwrite 1"):
            reopened(folder.root).newest_state()

    @pytest.mark.parametrize("damage", [
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes() + b"x"),
        lambda path: path.unlink(),
        lambda path: (path.unlink(), path.mkdir()),
    ], ids=["truncated", "empty", "longer", "deleted", "a folder"])  # fmt: skip
    def test_any_damage_is_named(self, folder, damage):
        path = folder.root / "args.yaml"
        damage(path)
        again = reopened(folder.root)
        with pytest.raises(RunFolderError, match="args.yaml is damaged or missing"):
            again.read("args.yaml")
        assert len(again.damaged()) == 1

    def test_any_flipped_bit_of_the_manifest_is_noticed(self, folder):
        folder.commit_state(b"first")
        path = folder.root / MANIFEST
        data = path.read_bytes()
        for position in range(len(data)):
            damaged = bytearray(data)
            damaged[position] ^= 1 << position % 7
            path.write_bytes(damaged)
            with pytest.raises(RunFolderError, match="manifest.json is damaged"):
                reopened(folder.root)

    @pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"null", b"\xff\xfe", b"[" * 100000, b'{"sha256": 1}'])
    def test_nonsense_for_a_manifest(self, folder, content):
        (folder.root / MANIFEST).write_bytes(content)
        with pytest.raises(RunFolderError, match="manifest.json is damaged"):
            reopened(folder.root)

    def test_lost_manifest_is_no_new_run(self, folder):
        (folder.root / MANIFEST).unlink()
        before = files_of(folder.root)
        with pytest.raises(RunFolderError, match="args.yaml, Results, models, but no manifest.json"):
            reopened(folder.root)
        assert files_of(folder.root) == before

    def test_unknown_file(self, folder):
        with pytest.raises(RunFolderError, match="not among the files"):
            folder.read("../secret")


class TestDiskErrors:
    def test_full_file_size_limit(self, folder):
        """In a process of its own, because limits stay."""
        script = (
            "import resource, sys; from pathlib import Path; from utils.checkpoint import *\n"
            f"folder = RunFolder(Path({str(folder.root)!r})); folder.open()\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))\n"
            "try: folder.commit({'args.yaml': b'x' * 10, 'models/task-2/S_class.pth': b'x' * 5000})\n"
            "except RunFolderError as error: print(error)\n"
        )
        command, here = [sys.executable, "-c", script], Path(__file__).parents[2]
        done = subprocess.run(command, capture_output=True, text=True, cwd=here)
        assert done.returncode == 0 and done.stderr == ""
        assert "cannot write" in done.stdout and "S_class.pth: File too large" in done.stdout
        assert contents(reopened(folder.root)) == OLD
        assert not list(folder.root.rglob(".*.unfinished"))

    @pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a file system")
    def test_full_file_system(self, tmp_path):
        root = tmp_path / "small"
        root.mkdir()
        if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(root)]).returncode:
            pytest.skip("may not mount")
        try:
            folder = RunFolder(root)
            folder.open()
            folder.commit({"args.yaml": b"old", "models/a": b"x" * 100_000})
            with pytest.raises(RunFolderError, match=r"models/b: No space left on device; what was there before"):
                folder.commit({"args.yaml": b"new", "models/b": b"x" * 200_000})
            assert contents(reopened(root)) == {"args.yaml": b"old", "models/a": b"x" * 100_000}
            folder.commit({"models/a": b"y" * 50_000})  # and once there is room, it goes on
            assert reopened(root).read("models/a") == b"y" * 50_000
        finally:
            subprocess.run(["umount", str(root)], check=True)

    @pytest.mark.parametrize("operation", ["fsync", "replace"])
    @pytest.mark.parametrize("number", range(6))
    def test_any_failing_operation(self, folder, monkeypatch, operation, number):
        """An input/output error: the old files or the new ones, and a sentence with the path."""
        real, calls = getattr(os, operation), []

        def failing(*args):
            calls.append(args)
            if len(calls) == number + 1:
                raise OSError(errno.EIO, "Input/output error")
            return real(*args)

        with monkeypatch.context() as patch:
            patch.setattr(os, operation, failing)
            try:
                folder.commit(NEW)
            except RunFolderError as error:
                assert "cannot write" in str(error) and "Input/output error" in str(error)
        assert contents(reopened(folder.root)) in (OLD, {**OLD, **NEW})

    def test_read_only_folder(self, folder, monkeypatch):
        def refuse(path, mode="r", *args, **kwargs):
            if "w" in mode:
                raise OSError(errno.EROFS, "Read-only file system")
            return real(path, mode, *args, **kwargs)

        real = open
        monkeypatch.setattr("builtins.open", refuse)
        with pytest.raises(RunFolderError, match="Read-only file system"):
            folder.commit(NEW)
        read_only = RunFolder(folder.root)
        read_only.open(read_only=True)
        assert contents(read_only) == OLD

    def test_write_atomic_leaves_the_old_file(self, tmp_path):
        path = tmp_path / "a"
        write_atomic(path, b"old")
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
        try:
            with pytest.raises(RunFolderError, match="File too large"):
                write_atomic(path, b"x" * 1000)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert path.read_bytes() == b"old" and files_of(tmp_path) == {"a"}


class TestLock:
    def test_second_owner_is_refused_and_told_who(self, tmp_path):
        with RunLock(tmp_path):
            for _ in range(2):  # asking must not give the lock away
                with pytest.raises(RunFolderBusyError, match=f"in use by process {os.getpid()} on "):
                    RunLock(tmp_path)
            assert other_process_may_lock(tmp_path) is False
        assert not (tmp_path / LOCK).exists()
        assert other_process_may_lock(tmp_path) is True
        with RunLock(tmp_path):
            pass

    def test_lock_of_a_dead_process_is_taken_over(self, tmp_path):
        (tmp_path / LOCK).write_text(json.dumps({"pid": 1, "host": "elsewhere"}))
        with RunLock(tmp_path):
            assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()

    @pytest.mark.parametrize("content", ["", "{", "[]", "\x00" * 100])
    def test_damaged_lock_file(self, tmp_path, content):
        (tmp_path / LOCK).write_text(content)
        with RunLock(tmp_path):
            pass

    def test_cannot_be_made(self, tmp_path):
        with pytest.raises(RunFolderError, match="cannot write .*No such file"):
            RunLock(tmp_path / "missing")

    def test_move_aside_keeps_everything_and_the_lock(self, folder):
        with RunLock(folder.root) as lock:
            target = lock.move_folder_aside()
            assert target.name == "run.old-1" and contents(reopened(target)) == OLD
            assert files_of(target) == {*OLD, MANIFEST} and files_of(folder.root) == {LOCK}
            assert other_process_may_lock(folder.root) is False
            assert other_process_may_lock(target) is True
            assert lock.move_folder_aside().name == "run.old-2"
        assert files_of(folder.root) == set()

    def test_current_folder_is_not_moved(self, folder, monkeypatch):
        monkeypatch.chdir(folder.root / "models")
        with RunLock(folder.root) as lock, pytest.raises(RunFolderError, match="the current folder"):
            lock.move_folder_aside()
        assert contents(reopened(folder.root)) == OLD

    @pytest.fixture
    def no_locks(self, monkeypatch):
        """A file system without locks, as some network file systems are."""

        def refuse(*_):
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(fcntl, "lockf", refuse)
        monkeypatch.setattr("time.sleep", lambda _: None)

    def test_without_locks_the_owner_decides(self, tmp_path, no_locks):
        for owner, free in (
            ({"pid": os.getppid(), "host": os.uname().nodename}, False),
            ({"pid": 2**22 + 1, "host": os.uname().nodename}, True),
            ({"pid": 1, "host": "elsewhere"}, False),
            ({"host": os.uname().nodename}, True),
            ({}, True),
        ):
            (tmp_path / LOCK).write_text(json.dumps(owner))
            if free:
                with RunLock(tmp_path):
                    pass
            else:
                with pytest.raises(RunFolderBusyError, match="if that process is dead, remove"):
                    RunLock(tmp_path)

    def test_without_locks_one_of_two_claims_stands(self, tmp_path, no_locks, monkeypatch):
        other = {"pid": 12345, "host": "elsewhere"}
        monkeypatch.setattr("time.sleep", lambda _: (tmp_path / LOCK).write_text(json.dumps(other)))
        with pytest.raises(RunFolderBusyError, match="process 12345 on elsewhere"):
            RunLock(tmp_path)

    def test_removed_in_between(self, tmp_path, monkeypatch):
        """The owner before removes the file between opening and locking: that file's lock protects nothing."""
        real, calls = fcntl.lockf, []

        def lock(file, how):
            calls.append(file)
            if len(calls) == 1:
                (tmp_path / LOCK).unlink()
            return real(file, how)

        monkeypatch.setattr(fcntl, "lockf", lock)
        with RunLock(tmp_path):
            assert len(calls) == 2 and other_process_may_lock(tmp_path) is False


class TestTensors:
    def test_round_trip(self):
        state = {"a": torch.randn(3, 4), "b": [1, 2.5, None, "x"]}
        again = from_bytes(to_bytes(state))
        assert torch.equal(again["a"], state["a"]) and again["b"] == state["b"]
        assert to_bytes(state) == to_bytes({"a": state["a"].clone(), "b": [1, 2.5, None, "x"]})

    def test_code_is_not_run(self, tmp_path):
        class Hostile:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "made"),)

        for data in (to_bytes({"a": Hostile()}), b"", b"PK\x03\x04", b"x" * 1000):
            with pytest.raises(RunFolderError, match="no file of tensors"):
                from_bytes(data)
        assert not (tmp_path / "made").exists()


def other_process_may_lock(root) -> bool:
    """Whether a fork of this process gets the lock."""
    result = []

    def ask():
        read, write = os.pipe()
        if os.fork() == 0:
            code = b"0"
            try:
                checkpoint.RunLock._held.clear()
                RunLock(root)
                code = b"1"
            except RunFolderBusyError:
                pass
            finally:
                os.write(write, code)
                os._exit(0)
        os.close(write)
        result.append(os.read(read, 1) == b"1")
        os.close(read)
        os.wait()

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    return result[0]
