"""The folder of a run: its files are written whole or not at all, and one process at a time owns it.

The newest state is the only truth: it holds everything that a resume needs. Models and results follow from it and are
written before the state that comes after them, so a process that is killed in between repeats work that gives the same
bytes. Importing this module loads no torch.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import logging
import os
import socket
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from utils.config import Config, ConfigError

ARGS, CLASSES, LOG, LOCK = "args.yaml", "classes.json", "output.log", ".lock"
STATE, PREVIOUS_STATE = "state/newest.pth", "state/previous.pth"
METRICS = "Results/metrics.json"
ARGS_END = "# end of the settings\n"  # the last line, without which the file has been cut
_UNFINISHED = ".unfinished"

_log = logging.getLogger(__name__)


class RunFolderError(RuntimeError):
    """A file of the run cannot be written, or is damaged; the message names it and the reason."""


class RunFolder:
    """The files of one run.

    Args:
        root: the run's ``--log_dir``.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root)

    @property
    def has_run(self) -> bool:
        """Whether a run has started here, be it damaged."""
        return (self.root / ARGS).exists() and (self.root / CLASSES).exists()

    def write(self, name: str, data: bytes) -> None:
        """Write one file (raises :class:`RunFolderError`)."""
        write_atomic(self.root / name, data)

    def read(self, name: str) -> bytes:
        """Content of a file.

        Raises:
            RunFolderError: it is missing, or a checksum of the archive that holds its tensors is wrong.
        """
        path = self.root / name
        try:
            data = path.read_bytes()
            if path.suffix == ".pth" and zipfile.ZipFile(io.BytesIO(data)).testzip() is not None:
                raise zipfile.BadZipFile("a checksum in it is wrong")
        except OSError as error:
            raise RunFolderError(f"{path} cannot be read ({error.strerror})") from error
        except (zipfile.BadZipFile, ValueError, EOFError) as error:
            raise RunFolderError(f"{path} is damaged ({error})") from error
        return data

    def read_json(self, name: str) -> dict[str, Any]:
        """The object in a JSON file (raises :class:`RunFolderError`)."""
        data = self.read(name)
        try:
            content = json.loads(data)
            if not isinstance(content, dict):
                raise ValueError("it holds no object")
        except (ValueError, RecursionError) as error:
            raise RunFolderError(f"{self.root / name} is damaged ({error})") from error
        return content

    def settings(self) -> dict[str, Any]:
        """The content of ``args.yaml`` (raises :class:`RunFolderError`)."""
        import yaml

        text = self.read(ARGS).decode(errors="replace")
        try:
            settings = yaml.safe_load(text)
            if not isinstance(settings, dict) or not text.endswith(ARGS_END):
                raise ValueError("it has been cut or changed")
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            reason = str(error).splitlines()[0]
            raise RunFolderError(f"{self.root / ARGS} is damaged ({reason}): restore it from a copy") from error
        return settings

    def save_state(self, state: bytes) -> None:
        """Make ``state`` the newest; the one before it stays, in case this one is damaged later."""
        newest = self.root / STATE
        write_beside(newest, state)
        if newest.exists():
            os.replace(newest, self.root / PREVIOUS_STATE)
        move_into_place(newest)

    def load_state(self) -> Any:
        """The newest undamaged state; None if there never was one.

        Raises:
            RunFolderError: every state is damaged.
        """
        problems = []
        for name in (STATE, PREVIOUS_STATE):
            if not (self.root / name).exists():
                continue
            try:
                state = from_bytes(self.read(name))
            except RunFolderError as error:
                problems.append(str(error))
                continue
            for problem in problems:
                _log.warning("%s; resuming from the state before it", problem)
            return state
        if problems:
            raise RunFolderError(
                f"there is no state to resume from: {'; '.join(problems)}. Restore it from a copy; or --overwrite 1 "
                "moves the folder aside and starts over"
            )
        return None


@contextlib.contextmanager
def open_run(config: Config) -> Iterator[RunFolder]:
    """The run folder ``--log_dir``, locked; an old run in it is moved aside first if ``--overwrite 1`` says so.

    Whatever was not there before is gone again if the run does not start.

    Raises:
        ConfigError: the folder cannot be written, is in use, is damaged, or holds something else than a run with
            these settings. Nothing in it has changed.
    """
    folder = RunFolder(config.log_dir)
    missing = [path for path in (folder.root, *folder.root.parents) if not path.exists()]
    had_log = (folder.root / LOG).exists()
    try:
        with contextlib.ExitStack() as stack:
            try:
                _refuse_foreign(folder)
                folder.root.mkdir(parents=True, exist_ok=True)
                stack.enter_context(_locked(folder.root))
                if config.overwrite and folder.has_run:
                    stack.enter_context(_moved_aside(folder.root))
                check_settings(config)
                for path in folder.root.rglob(f".*{_UNFINISHED}"):  # of a process that was killed
                    path.unlink()
            except RunFolderError as error:
                raise ConfigError([str(error)]) from error
            except OSError as error:
                raise ConfigError([f"--log_dir {folder.root} cannot be used ({error.strerror})"]) from error
            yield folder
    finally:
        if not folder.has_run:
            with contextlib.suppress(OSError):
                if not had_log:
                    (folder.root / LOG).unlink(missing_ok=True)
                for path in missing:
                    path.rmdir()


def _refuse_foreign(folder: RunFolder) -> None:
    found = [name for name in (ARGS, "Results", "models", "state") if (folder.root / name).exists()]
    if found and not folder.has_run:
        raise RunFolderError(
            f"{folder.root} holds {', '.join(found)}, but not both {ARGS} and {CLASSES}: it is no run of this project, "
            "or has lost these files; choose another log_dir, or move everything in it away"
        )


# ------------------------------------------------------------------------------------------------- settings


def check_settings(config: Config, *, resume: bool = True) -> None:
    """Compare the settings of the run in ``config.log_dir``, if there is one, with ``config``.

    Args:
        resume: the run is resumed, which may learn more tasks than it was started for; False where its models are
            used, which takes exactly its settings.

    Raises:
        ConfigError: naming the settings that differ.
        RunFolderError: ``args.yaml`` or ``classes.json`` is damaged.
    """
    folder = RunFolder(config.log_dir)
    changed = differing_settings(config)
    if not changed or (resume and _only_more_tasks(changed)):
        return
    way_out = (
        "choose another log_dir, give the old settings, or start over with --overwrite 1, which moves the old folder "
        "aside"
        if resume
        else f"leave the flags that change them, or --config, out; its {ARGS} has all settings"
    )
    changes = ", ".join(f"{key} {before} -> {now}" for key, (before, now) in changed.items())
    raise ConfigError([f"--log_dir {folder.root} holds a run with other settings ({changes}): {way_out}"])


def differing_settings(config: Config) -> dict[str, tuple[object, object]]:
    """Settings that affect results and differ: key -> (value of the run in the folder, value in ``config``).

    Weights that have only moved do not differ.
    """
    folder = RunFolder(config.log_dir)
    if not folder.has_run:
        return {}
    before, now = folder.settings(), config.result_settings()
    weights = folder.read_json(CLASSES).get("backbone_sha256", {})
    files = {"t_weights": ("teacher", config.teacher_weights), "s_weights": ("student", config.student_weights)}
    moved = {
        key
        for key, (role, path) in files.items()
        if path is not None and before.get(key) != now[key] and sha256_of(path) == weights.get(role)
    }
    return {key: (before.get(key), now[key]) for key in now if before.get(key) != now[key] and key not in moved}


def _only_more_tasks(changed: dict[str, tuple[object, object]]) -> bool:
    """Whether ``max_task`` alone differs and is larger: it says when to stop and changes nothing else."""
    if list(changed) != ["max_task"]:
        return False
    before, now = changed["max_task"]
    return before != -1 and (now == -1 or now > before)


def is_finished(config: Config) -> bool:
    """Whether ``config.log_dir`` holds everything that ``config`` asks for (raises :class:`RunFolderError`)."""
    folder = RunFolder(config.log_dir)
    if not folder.has_run or not (folder.root / METRICS).exists() or differing_settings(config):
        return False
    return folder.read_json(METRICS).get("complete") is True


# ------------------------------------------------------------------------------------------------ ownership


@contextlib.contextmanager
def _locked(root: Path) -> Iterator[None]:
    """Hold a run's folder; the system releases it when the process dies, however that happens.

    The lock is a record lock, which belongs to the process: workers forked from it do not keep it alive. The file
    names process and host for the message that others get.

    Raises:
        RunFolderError: another process holds it, or it cannot be made.
    """
    path = root.resolve() / LOCK
    while True:
        with open(path, "r+", opener=lambda name, _: os.open(name, os.O_RDWR | os.O_CREAT, 0o666)) as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError) as error:
                raise RunFolderError(
                    f"--log_dir {root} is in use by {file.read() or 'another process'}: wait for it, stop it, or "
                    "choose another log_dir"
                ) from error
            if not (path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno()))):
                continue  # its holder removed it in between
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            try:
                yield
            finally:
                with contextlib.suppress(OSError):
                    if os.path.samestat(path.stat(), os.fstat(file.fileno())):
                        path.unlink()
            return


@contextlib.contextmanager
def _moved_aside(root: Path) -> Iterator[None]:
    """Move the folder to a free name beside it (``<name>.old-1``, …), and hold an empty one in its place."""
    root, number = root.resolve(), 1
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
    with _locked(root):
        _log.info("%s moved aside to %s", root, target)
        yield


# --------------------------------------------------------------------------------------------------- writing


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file beside its place, flush it to the disk and move it there.

    Raises:
        RunFolderError: the disk is full, the folder read-only, …; whatever was there before is untouched.
    """
    write_beside(path, data)
    move_into_place(path)


def write_beside(path: Path, data: bytes) -> None:
    """The first half of :func:`write_atomic`."""
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
        raise RunFolderError(f"cannot write {path}: {error.strerror}; what was there before is intact") from error


def move_into_place(path: Path) -> None:
    """The second half of :func:`write_atomic`; makes the new name as durable as the content."""
    try:
        os.replace(_beside(path), path)
        descriptor = os.open(path.parent, os.O_RDONLY)
    except OSError as error:
        raise RunFolderError(f"cannot write {path}: {error.strerror}; what was there before is intact") from error
    try:
        with contextlib.suppress(OSError):  # some network file systems refuse, and do not need it
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}{_UNFINISHED}")


def sha256_of(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def to_bytes(state: Any) -> bytes:
    """A state (tensors, numbers, strings in dicts and lists) as bytes; equal states give equal bytes."""
    import torch

    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def from_bytes(data: bytes) -> Any:
    """Load the result of :func:`to_bytes` to the CPU without running code from it (``weights_only``).

    Raises:
        RunFolderError: it is something else.
    """
    import torch

    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise RunFolderError(f"no file of tensors ({reason})") from error
