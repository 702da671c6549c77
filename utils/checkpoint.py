"""The files of a run: written whole or not at all, and owned by one process at a time.

A *commit* replaces any number of files as one: all new contents are first written beside their places and
flushed, then ``manifest.json`` with the SHA-256 of each replaces the old manifest (the moment at which the
commit counts), then the files move into place. A process that dies before that moment leaves the old state;
one that dies after it leaves moves that the next opening finishes.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
LOCK = ".lock"
STATES = ("state/a.pt", "state/b.pt")


class RunFolderError(RuntimeError):
    """A file of the run cannot be written, or is damaged; the message names it and the reason."""


class RunFolderBusyError(RunFolderError):
    """Another process works in the folder."""


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file beside its place, flush it to the disk and move it there.

    Raises:
        RunFolderError: the disk is full, the folder read-only, …; whatever was there before is untouched.
    """
    temporary = _write_beside(path, data)
    _move(temporary, path)


class RunFolder:
    """The files of one run, with a manifest of their SHA-256.

    Args:
        root: the run's ``--log_dir``.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        self.files: dict[str, str] = {}
        self.states: list[str] = []
        self.complete = False

    def open(self) -> None:
        """Read the manifest and finish the moves of a commit that was interrupted after it counted.

        Raises:
            RunFolderError: the manifest is damaged.
        """
        path = self.root / MANIFEST
        if path.exists():
            try:
                manifest = json.loads(path.read_text())
                self.files = {str(name): str(digest) for name, digest in manifest["files"].items()}
                self.states = [name for name in manifest["states"] if name in STATES]
                self.complete = bool(manifest["complete"])
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise RunFolderError(
                    f"{path} is damaged ({error}); --overwrite 1 moves the folder aside and starts anew"
                ) from error
        for name, digest in self.files.items():
            temporary = _beside(self.root / name)
            if temporary.exists() and _digest(temporary) == digest:
                _move(temporary, self.root / name)
        for leftover in [*self.root.glob(".*.tmp"), *self.root.glob("*/.*.tmp"), *self.root.glob("*/*/.*.tmp")]:
            leftover.unlink(missing_ok=True)

    def commit(self, files: Mapping[str, bytes], *, complete: bool = False) -> None:
        """Replace files as one; see the head of this module.

        Args:
            files: content by path below the folder.
            complete: nothing is left to do: the states, of no more use, go.

        Raises:
            RunFolderError: something cannot be written; the old files stand.
        """
        temporaries = []
        try:
            for name, data in files.items():
                temporaries.append((_write_beside(self.root / name, data), self.root / name))
            new = self.files | {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
            states = self._states_after(files)
            if complete:
                states, new = [], {name: digest for name, digest in new.items() if name not in STATES}
            manifest = {"files": dict(sorted(new.items())), "states": states, "complete": complete}
            write_atomic(self.root / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
        except BaseException:
            for temporary, _ in temporaries:
                temporary.unlink(missing_ok=True)
            raise
        for temporary, path in temporaries:
            _move(temporary, path)
        self.files, self.states, self.complete = new, states, complete
        if complete:
            shutil.rmtree(self.root / "state", ignore_errors=True)

    def commit_state(self, data: bytes, files: Mapping[str, bytes] | None = None) -> None:
        """Commit a state in the place of the older of the two, and other files with it."""
        older = STATES[1] if self.states[:1] == [STATES[0]] else STATES[0]
        self.commit({older: data, **(files or {})})

    def read(self, name: str) -> bytes:
        """Content of a file of the manifest.

        Raises:
            RunFolderError: it is missing or differs from what was written.
        """
        path = self.root / name
        if name not in self.files:
            raise RunFolderError(f"{path} is not among the files of this run (see {MANIFEST})")
        try:
            data = path.read_bytes()
        except OSError as error:
            raise RunFolderError(f"{path} cannot be read ({error.strerror})") from error
        if hashlib.sha256(data).hexdigest() != self.files[name]:
            raise RunFolderError(f"{path} is damaged: its SHA-256 is not the one in {MANIFEST}")
        return data

    def newest_state(self) -> bytes | None:
        """The newest undamaged state, or None when none was ever written.

        Raises:
            RunFolderError: every state is damaged.
        """
        problems = []
        for name in self.states:
            try:
                data = self.read(name)
            except RunFolderError as error:
                _log.warning("%s; trying the state before it", error)
                problems.append(str(error))
                continue
            return data
        if problems:
            raise RunFolderError(
                f"no state to resume from: {'; '.join(problems)}. Restore the files from a copy, or start anew "
                "with --overwrite 1, which moves the old folder aside"
            )
        return None

    def _states_after(self, files: Mapping[str, bytes]) -> list[str]:
        written = [name for name in files if name in STATES]
        return written + [name for name in self.states if name not in written]


_held: set[str] = set()


@contextlib.contextmanager
def run_lock(root: Path) -> Iterator[None]:
    """Hold the folder for this process.

    The lock is released by the system when its process dies, however that happens; the file names pid and
    host for the message.

    Raises:
        RunFolderBusyError: another live process holds it.
    """
    path = Path(root) / LOCK
    key = str(path.resolve())
    if key in _held:
        raise RunFolderBusyError(_busy(path))
    file = _locked_file(path)
    _held.add(key)
    try:
        file.truncate(0)
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        os.pwrite(file.fileno(), json.dumps(owner).encode(), 0)
        yield
    finally:
        _held.discard(key)
        path.unlink(missing_ok=True)
        file.close()


def _locked_file(path: Path) -> io.BufferedRandom:
    while True:
        file = open(path, "a+b")
        try:
            # A record lock belongs to the process: data-loader workers forked from it do not keep it alive.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            file.close()
            raise RunFolderBusyError(_busy(path)) from error
        except OSError as error:  # a file system without locks: go by the owner's pid
            if _owner_lives(path):
                file.close()
                raise RunFolderBusyError(_busy(path)) from error
        if path.exists() and os.fstat(file.fileno()).st_ino == path.stat().st_ino:
            return file
        file.close()  # its holder removed it in between


def _owner(path: Path) -> dict[str, Any]:
    try:
        owner = json.loads(path.read_text())
        return owner if isinstance(owner, dict) else {}
    except (OSError, ValueError):
        return {}


def _owner_lives(path: Path) -> bool:
    owner = _owner(path)
    if owner.get("host") != socket.gethostname():
        return bool(owner)
    try:
        os.kill(int(owner["pid"]), 0)
    except (ProcessLookupError, KeyError, ValueError):
        return False
    except PermissionError:
        return True
    return True


def _busy(path: Path) -> str:
    owner = _owner(path)
    who = f"process {owner.get('pid', '?')} on {owner.get('host', '?')}"
    return f"--log_dir {path.parent} is in use by {who}; wait for it, stop it, or choose another log_dir"


def move_aside(root: Path) -> Path:
    """Move a run's folder to a free name beside it (``<name>.old-1``, …), for ``--overwrite 1``."""
    root = Path(root)
    number = 1
    while (target := root.with_name(f"{root.name}.old-{number}")).exists():
        number += 1
    os.rename(root, target)
    return target


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def _write_beside(path: Path, data: bytes) -> Path:
    temporary = _beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise RunFolderError(f"cannot write {path}: {error.strerror}; the last good state is intact") from error
    return temporary


def _move(temporary: Path, path: Path) -> None:
    try:
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise RunFolderError(f"cannot write {path}: {error.strerror}; the last good state is intact") from error


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def to_bytes(state: Any) -> bytes:
    """A state (tensors, numbers, strings in dicts and lists) as bytes; equal states give equal bytes."""
    import torch

    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def from_bytes(data: bytes) -> Any:
    """What :func:`to_bytes` wrote, on the CPU; never runs code (``weights_only``)."""
    import torch

    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
