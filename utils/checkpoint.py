"""The folder of a run: its files are written whole or not at all, and one process at a time owns it.

The newest state is the only truth: it holds everything that a resume needs. Models and results follow from it and are
written before the state that comes after them, so a process that is killed in between repeats work that gives the same
bytes. Importing this module loads no torch.
"""

import contextlib
import fcntl
import hashlib
import io
import itertools
import json
import logging
import os
import socket
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from utils.config import Config, ConfigError, load_yaml

ARGS, CLASSES, LOG, LOCK = "args.yaml", "classes.json", "output.log", ".lock"
STATE, PREVIOUS_STATE = "state/newest.pth", "state/previous.pth"
METRICS = "Results/metrics.json"
ARGS_END = "# end of the settings\n"  # the last line, without which the file has been cut
_UNFINISHED = ".unfinished"
_OWN_FILE = os.O_CREAT | os.O_NOFOLLOW  # a link could lead to any file, which would be written to

_log = logging.getLogger(__name__)


class RunFolderError(RuntimeError):
    """A file of the run cannot be written, or is damaged; the message names it and the reason."""


class RunFolder:
    """The files of one run; ``root`` is its ``--log_dir``."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root)

    @property
    def has_run(self) -> bool:
        """Whether a run has started here, even if it is damaged now."""
        return os.path.exists(self.root / ARGS) and os.path.exists(self.root / CLASSES)  # also if the name is too long

    def write(self, name: str, data: bytes) -> None:
        """Write one file (raises :class:`RunFolderError`)."""
        write_atomic(self.root / name, data)

    def read(self, name: str) -> bytes:
        """Content of a file (raises :class:`RunFolderError`, also for a wrong checksum in an archive of tensors)."""
        path = self.root / name
        try:
            data = path.read_bytes()
            if path.suffix == ".pth" and zipfile.ZipFile(io.BytesIO(data)).testzip() is not None:
                raise ValueError("a checksum in it is wrong")
        except Exception as error:  # a damaged archive can raise anything
            what = f"cannot be read ({error.strerror})" if isinstance(error, OSError) else f"is damaged ({error})"
            raise RunFolderError(f"{path} {what}") from error
        return data

    def read_json(self, name: str) -> dict[str, Any]:
        """The object in a JSON file (raises :class:`RunFolderError`)."""
        try:
            return json.loads(self.read(name))
        except ValueError as error:
            raise RunFolderError(f"{self.root / name} is damaged ({error})") from error

    def settings(self) -> dict[str, Any]:
        """The content of ``args.yaml`` (raises :class:`RunFolderError`)."""
        path = self.root / ARGS
        if not self.read(ARGS).endswith(ARGS_END.encode()):
            raise RunFolderError(f"{path} is damaged (it has been cut or changed): restore it from a copy")
        try:
            return load_yaml(path)
        except ValueError as error:
            raise RunFolderError(str(error)) from error

    def save_state(self, state: bytes) -> None:
        """Make ``state`` the newest; the one before it stays, in case this one is damaged later."""
        write_atomic(self.root / STATE, state, previous=self.root / PREVIOUS_STATE)

    def load_state(self) -> Any:
        """The newest undamaged state, None if there never was one (raises :class:`RunFolderError`)."""
        problems = []
        for name in (name for name in (STATE, PREVIOUS_STATE) if (self.root / name).exists()):
            try:
                state = from_bytes(self.read(name))
                if problems:
                    _log.warning("%s; resuming from the state before it", problems[0])
                return state
            except RunFolderError as error:
                problems.append(str(error))
        if problems:
            way_out = "Restore it from a copy; or --overwrite 1 moves the folder aside and starts over"
            raise RunFolderError(f"there is no state to resume from: {'; '.join(problems)}. {way_out}")
        return None


@contextlib.contextmanager
def open_run(config: Config) -> Iterator[RunFolder]:
    """The run folder ``--log_dir``, locked; an old run in it is moved aside first if ``--overwrite 1`` says so.

    Whatever was not there before is removed again if the run does not start. After a ConfigError (the folder cannot be
    written, is in use, or holds anything other than a run with these settings) nothing in it has changed.
    """
    folder = RunFolder(config.log_dir)
    root = folder.root
    new = [path for path in (root / LOG, root, *root.parents) if not os.path.exists(path)]
    try:
        with contextlib.ExitStack() as stack:
            try:
                found = [name for name in (ARGS, "Results", "models", "state") if (root / name).exists()]
                if found and not folder.has_run:
                    what = f"{', '.join(found)}, but not both {ARGS} and {CLASSES}"
                    reason = "it is not a run of this project, or has lost these files"
                    way_out = "choose another log_dir, or move everything in it away"
                    raise ConfigError(f"{root} holds {what}: {reason}; {way_out}")
                if config.overwrite and folder.has_run:
                    with _locked(root):
                        _move_aside(root.resolve())
                root.mkdir(parents=True, exist_ok=True)
                stack.enter_context(_locked(root))
                os.close(os.open(root / LOG, os.O_WRONLY | _OWN_FILE, 0o666))
                check_settings(config)
                for path in root.rglob(f".*{_UNFINISHED}"):  # of a process that was killed
                    path.unlink()
            except OSError as error:
                raise ConfigError(f"--log_dir {root} cannot be used ({error}); choose another folder") from error
            yield folder
    finally:
        if not folder.has_run:
            with contextlib.suppress(OSError):
                for path in new:
                    path.unlink(missing_ok=True) if path.name == LOG else path.rmdir()


@contextlib.contextmanager
def _locked(root: Path) -> Iterator[None]:
    """Hold a run's folder (raises ConfigError if another process does); the system releases it when the process dies.

    The lock is a record lock, which belongs to the process: workers forked from it do not keep it alive. The file
    names process and host for the message that others get.
    """
    path = root.resolve() / LOCK
    with open(path, "r+", opener=lambda name, _: os.open(name, os.O_RDWR | _OWN_FILE, 0o666)) as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(path.stat(), os.fstat(file.fileno())):
                raise FileNotFoundError(path)  # its holder has removed it in between
        except (BlockingIOError, PermissionError, FileNotFoundError) as error:
            owner = file.read() or "another process"
            way_out = "wait for it, stop it, or choose another log_dir"
            raise ConfigError(f"--log_dir {root} is in use by {owner}: {way_out}") from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield
        finally:
            with contextlib.suppress(FileNotFoundError):  # the folder may have moved aside
                if os.path.samestat(path.stat(), os.fstat(file.fileno())):
                    path.unlink()


def _move_aside(root: Path) -> None:
    """Move a folder to a free name beside it: ``<name>.old-1``, …"""
    names = (root.with_name(f"{root.name}.old-{number}") for number in itertools.count(1))
    target = next(path for path in names if not path.exists())
    if Path.cwd().is_relative_to(root):
        raise ConfigError(f"cannot move {root}, because it is the current folder: start from another one")
    os.rename(root, target)
    (target / LOCK).unlink()
    _log.info("%s moved aside to %s", root, target)


def check_settings(config: Config, *, resume: bool = True) -> None:
    """Compare the settings of the run in ``config.log_dir``, if there is one, with ``config``.

    Where the run is resumed it may learn more tasks than it was started for; the use of its models takes exactly its
    settings. Raises ConfigError, which names the settings that differ, and RunFolderError for a damaged run.
    """
    changed = differing_settings(config)
    if resume and list(changed) == ["max_task"]:  # says when to stop and changes nothing else
        before, now = changed["max_task"]
        if before != -1 and (now == -1 or now > before):
            return
    if changed:
        way_out = f"leave the flags that change them, or --config, out; its {ARGS} has all settings"
        if resume:
            way_out = "choose another log_dir, give the old settings, or --overwrite 1, which moves the folder aside"
        changes = ", ".join(f"{key} {before} -> {now}" for key, (before, now) in changed.items())
        raise ConfigError(f"--log_dir {config.log_dir} holds a run with other settings ({changes}): {way_out}")


def differing_settings(config: Config) -> dict[str, tuple[object, object]]:
    """Settings that affect results and differ, not weights that only moved: key -> (the run's value, ``config``'s)."""
    folder = RunFolder(config.log_dir)
    if not folder.has_run:
        return {}
    changed = config.changes(folder.settings())
    weights = folder.read_json(CLASSES).get("backbone_sha256", {})
    files = {"t_weights": ("teacher", config.teacher_weights), "s_weights": ("student", config.student_weights)}
    for key, (role, path) in files.items():
        if key in changed and path is not None and sha256_of(path) == weights.get(role):
            del changed[key]
    return changed


def is_finished(config: Config) -> bool:
    """Whether ``config.log_dir`` holds everything that ``config`` asks for (raises :class:`RunFolderError`)."""
    folder = RunFolder(config.log_dir)
    if not folder.has_run or not (folder.root / METRICS).exists() or differing_settings(config):
        return False
    return folder.read_json(METRICS).get("complete") is True


def write_atomic(path: Path, data: bytes, *, previous: Path | None = None) -> None:
    """Write a file beside its place, flush it to the disk and move it there; the old one is kept as ``previous``.

    Raises RunFolderError for a full disk, a read-only folder, …; whatever was there before is then untouched.
    """
    temporary = path.with_name(f".{path.name}{_UNFINISHED}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
        descriptor = os.open(path.parent, os.O_RDONLY)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise RunFolderError(f"cannot write {path}: {error.strerror}; what was there before is intact") from error
    with contextlib.suppress(OSError):  # makes the name durable; some network file systems refuse, and do not need it
        os.fsync(descriptor)
    os.close(descriptor)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def to_bytes(state: Any) -> bytes:
    """A state (tensors, numbers, strings in dicts and lists) as bytes; equal states give equal bytes."""
    import torch

    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def from_bytes(data: bytes) -> Any:
    """Load the result of :func:`to_bytes` to the CPU without running code from it (raises :class:`RunFolderError`)."""
    import torch

    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise RunFolderError(f"not a file of tensors ({reason})") from error
