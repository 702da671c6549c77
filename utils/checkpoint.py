"""The files of a run: written whole or not at all, and owned by one process at a time.

A *commit* replaces any number of files as one: all new contents are first written beside their places and
flushed, then ``manifest.json`` with the SHA-256 of each replaces the old manifest (the moment at which the
commit counts), then the files move into place. A process that dies before that moment leaves the old files;
one that dies after it leaves moves that the next opening finishes.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import os
import pickle
import socket
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
LOCK = ".lock"
STATES = ("state/a", "state/b")
# What a run's folder may hold besides; a folder can hold other things, too, which are left alone.
FILES = ("args.yaml", "classes.json", "Results", "models", "state")
_FOLDERS = ("", "Results", "models/*", "state")
_UNFINISHED = ".unfinished"
_ANEW = "--overwrite 1 moves the folder aside and starts anew"


class RunFolderError(RuntimeError):
    """A file of the run cannot be written, or is damaged; the message names it and the reason."""


class RunFolderBusyError(RunFolderError):
    """Another process works in the folder."""


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file beside its place, flush it to the disk and move it there.

    Raises:
        RunFolderError: the disk is full, the folder read-only, …; whatever was there before is untouched.
    """
    _write_beside(path, data)
    _move(path)
    _flush_folder(path.parent)


class RunFolder:
    """The files of one run, with a manifest of their SHA-256.

    Args:
        root: the run's ``--log_dir``.

    Attributes:
        files: path below ``root`` -> SHA-256.
        states: the states among them, the newest first -> files that one needs besides itself.
        complete: nothing is left to do.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        self.files: dict[str, str] = {}
        self.states: dict[str, list[str]] = {}
        self.complete = False

    def has_manifest(self) -> bool:
        """Whether there is a run in the folder, be it damaged."""
        return (self.root / MANIFEST).exists()

    def open(self, *, read_only: bool = False) -> None:
        """Read the manifest and, unless ``read_only``, tidy up after a process that was killed.

        Raises:
            RunFolderError: the manifest is damaged or gone.
        """
        if self.has_manifest():
            self.files, self.states, self.complete = _read_manifest(self.root / MANIFEST)
        else:
            found = [name for name in FILES if (self.root / name).exists()]
            if found:
                raise RunFolderError(
                    f"{self.root} holds {', '.join(found)}, but no {MANIFEST}: it is no run of this project, or has "
                    "lost that file; choose another log_dir, or move what is there away"
                )
        if not read_only:
            self._finish_moves()
            self._remove_leftovers()

    def commit(
        self, files: Mapping[str, bytes], *, complete: bool = False, states: Mapping[str, list[str]] | None = None
    ) -> None:
        """Replace files as one; see the head of this module.

        Args:
            files: content by path below the folder.
            complete: nothing is left to do; of the states only the newest stays.
            states: those among ``files``, with what they need.

        Raises:
            RunFolderError: something cannot be written; the old files stand.
        """
        digests = self.files | {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
        states = {**(states or {}), **{name: needs for name, needs in self.states.items() if name not in files}}
        if complete:
            states = dict(list(states.items())[:1])
            digests = {name: digest for name, digest in digests.items() if name in states or name not in STATES}
        try:
            for name, data in files.items():
                _write_beside(self.root / name, data)
            for folder in {(self.root / name).parent for name in files}:
                _flush_folder(folder)
            write_atomic(self.root / MANIFEST, _manifest(digests, states, complete))
        except BaseException:
            for name in files:
                with contextlib.suppress(OSError):
                    _beside(self.root / name).unlink(missing_ok=True)
            raise
        self.files, self.states, self.complete = digests, states, complete
        self._finish_moves(files)
        if complete:
            self._remove_leftovers()

    def commit_state(self, data: bytes, needs: Iterable[str] = (), files: Mapping[str, bytes] | None = None) -> None:
        """Commit a state in the place of the older of the two, and other ``files`` with it.

        Args:
            needs: other files of the run without which the state is of no use.
        """
        older = STATES[1] if next(iter(self.states), None) == STATES[0] else STATES[0]
        self.commit({older: data, **(files or {})}, states={older: list(needs)})

    def read(self, name: str) -> bytes:
        """Content of a file of the manifest.

        Raises:
            RunFolderError: it is missing or differs from what was written.
        """
        path = self.root / name
        if name not in self.files:
            raise RunFolderError(f"{path} is not among the files of this run (see {MANIFEST})")
        reason = "its SHA-256 is not the one in " + MANIFEST
        for place in (path, _beside(path)):  # a commit that was interrupted leaves it beside its place
            try:
                data = place.read_bytes()
            except OSError as error:
                reason = str(error.strerror) if place == path else reason
                continue
            if hashlib.sha256(data).hexdigest() == self.files[name]:
                return data
        raise RunFolderError(f"{path} is damaged or missing ({reason})")

    def newest_state(self) -> tuple[bytes | None, list[str]]:
        """The newest state that is undamaged, as is all that it needs.

        Returns:
            the state, None when none was ever written; and what is wrong with newer ones.

        Raises:
            RunFolderError: every state is damaged.
        """
        problems: list[str] = []
        for name, needs in self.states.items():
            try:
                for other in needs:
                    self.read(other)
                return self.read(name), problems
            except RunFolderError as error:
                problems.append(str(error))
        if problems:
            raise RunFolderError(
                f"there is no state to go on from: {'; '.join(problems)}. Restore it from a copy; or {_ANEW}"
            )
        return None, []

    def damaged(self) -> list[str]:
        """What is wrong with the files, one sentence each."""
        problems = []
        for name in self.files:
            try:
                self.read(name)
            except RunFolderError as error:
                problems.append(str(error))
        return problems

    def _finish_moves(self, names: Iterable[str] | None = None) -> None:
        """Move what a commit has written into place: ``names``, or whatever an interrupted one has left.

        A power cut may undo this, which is no harm: it is then done again.
        """
        for name in self.files if names is None else names:
            path = self.root / name
            if names is not None or (_beside(path).exists() and sha256_of(_beside(path)) == self.files[name]):
                _move(path)

    def _remove_leftovers(self) -> None:
        """Remove unfinished files and states that no longer count; nothing depends on it."""
        with contextlib.suppress(OSError):
            for folder in _FOLDERS:
                for path in self.root.glob(f"{folder}/.*{_UNFINISHED}".lstrip("/")):
                    path.unlink()
            for name in STATES:
                if name not in self.files:
                    (self.root / name).unlink(missing_ok=True)


def _manifest(files: Mapping[str, str], states: Mapping[str, list[str]], complete: bool) -> bytes:
    pairs = [list(pair) for pair in states.items()]
    content = {"files": dict(sorted(files.items())), "states": pairs, "complete": complete}
    return (json.dumps(content | {"sha256": _own_digest(content)}, indent=1) + "\n").encode()


def _read_manifest(path: Path) -> tuple[dict[str, str], dict[str, list[str]], bool]:
    try:
        content = json.loads(path.read_bytes())
        digest = content.pop("sha256")
        if digest != _own_digest(content):
            raise ValueError("its own SHA-256 differs")
        return content["files"], dict(content["states"]), content["complete"]
    except OSError as error:
        raise RunFolderError(f"{path} cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RunFolderError(f"{path} is damaged ({error}): restore it from a copy; or {_ANEW}") from error


def _own_digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


# ------------------------------------------------------------------------------------------------ ownership


class RunLock:
    """Holds a run's folder for this process.

    The system releases the lock when the process dies, however that happens; the file names process and host
    for the message that others get. Where the file system knows no locks, the file alone decides.

    Args:
        root: the run's folder, which exists.

    Raises:
        RunFolderBusyError: another live process holds it.
        RunFolderError: the lock file cannot be made.
    """

    _held: set[str] = set()  # the system's locks do not keep a process from locking twice

    def __init__(self, root: Path) -> None:
        self._path = Path(root).resolve() / LOCK
        self._file = self._take()

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Give the folder free; a second call does nothing."""
        if not self._file.closed:
            self._held.discard(str(self._path))
            with contextlib.suppress(OSError):
                self._path.unlink(missing_ok=True)
            self._file.close()

    def move_folder_aside(self) -> Path:
        """Move the folder to a free name beside it (``<name>.old-1``, …), and hold an empty one in its place.

        Raises:
            RunFolderError: the folder cannot be moved.
            RunFolderBusyError: another process was faster in making the new folder its own.
        """
        root, number = self._path.parent, 1
        while (target := root.with_name(f"{root.name}.old-{number}")).exists():
            number += 1
        if Path.cwd().is_relative_to(root):
            raise RunFolderError(f"cannot move {root}, because it is the current folder: start from another one")
        try:
            os.rename(root, target)
            (target / LOCK).unlink(missing_ok=True)
            root.mkdir(exist_ok=True)
        except OSError as error:
            raise RunFolderError(f"cannot move {root} to {target}: {error.strerror}") from error
        self._held.discard(str(self._path))
        with self._file:  # the old folder stays locked until the new one is
            self._file = self._take()
        return target

    def _take(self) -> io.FileIO:
        if str(self._path) in self._held:
            raise RunFolderBusyError(_busy(self._path, {"pid": os.getpid(), "host": socket.gethostname()}))
        try:
            file = _locked_file(self._path)
        except OSError as error:
            raise RunFolderError(f"cannot write {self._path}: {error.strerror}") from error
        self._held.add(str(self._path))
        return file


def _locked_file(path: Path) -> io.FileIO:
    """The lock file, locked and with this process's name in it."""
    while True:
        file = io.FileIO(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+")
        try:
            # A record lock belongs to the process: data-loader workers forked from it do not keep it alive.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            file.close()
            raise RunFolderBusyError(_busy(path, _owner(path))) from error
        except OSError:  # a file system without locks
            return _claim(path, file)
        if _is_at(path, file):
            _sign(file)
            return file
        file.close()  # its holder removed it in between


def _is_at(path: Path, file: io.FileIO) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _claim(path: Path, file: io.FileIO) -> io.FileIO:
    """Own the folder by the lock file's content: of several claims the last one stands."""
    owner = _owner(path)
    if owner and _may_live(owner):
        file.close()
        raise RunFolderBusyError(f"{_busy(path, owner)} (if that process is dead, remove {path})")
    mine = _sign(file)
    time.sleep(0.5)  # others that also found no owner have signed by now
    if _owner(path) != mine:
        file.close()
        raise RunFolderBusyError(_busy(path, _owner(path)))
    return file


def _sign(file: io.FileIO) -> dict[str, Any]:
    owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    os.ftruncate(file.fileno(), 0)
    os.pwrite(file.fileno(), json.dumps(owner).encode(), 0)
    return owner


def _owner(path: Path) -> dict[str, Any]:
    try:
        owner = json.loads(path.read_bytes())
        return owner if isinstance(owner, dict) else {}
    except (OSError, ValueError):
        return {}


def _may_live(owner: Mapping[str, Any]) -> bool:
    if owner.get("host") != socket.gethostname():
        return True
    try:
        os.kill(int(owner["pid"]), 0)
    except (ProcessLookupError, KeyError, ValueError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def _busy(path: Path, owner: Mapping[str, Any]) -> str:
    who = f"process {owner.get('pid', '?')} on {owner.get('host', '?')}"
    return f"--log_dir {path.parent} is in use by {who}: wait for it, stop it, or choose another log_dir"


# --------------------------------------------------------------------------------------------------- writing


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}{_UNFINISHED}")


def _write_beside(path: Path, data: bytes) -> None:
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
        raise _cannot_write(path, error) from error


def _move(path: Path) -> None:
    try:
        os.replace(_beside(path), path)
    except OSError as error:
        raise _cannot_write(path, error) from error


def _flush_folder(folder: Path) -> None:
    """Make names in a folder as durable as the contents of its files."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise _cannot_write(folder, error) from error
    try:
        with contextlib.suppress(OSError):  # some network file systems refuse, and need it not
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _cannot_write(path: Path, error: OSError) -> RunFolderError:
    return RunFolderError(f"cannot write {path}: {error.strerror}; what was there before is intact")


def sha256_of(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


# -------------------------------------------------------------------------------------------------- tensors


def to_bytes(state: Any) -> bytes:
    """A state (tensors, numbers, strings in dicts and lists) as bytes; equal states give equal bytes."""
    import torch

    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def from_bytes(data: bytes) -> Any:
    """What :func:`to_bytes` wrote, on the CPU; never runs code (``weights_only``).

    Raises:
        RunFolderError: it is something else.
    """
    import torch

    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError, AttributeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise RunFolderError(f"no file of tensors ({reason})") from error
