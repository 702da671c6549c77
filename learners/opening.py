"""Open the folder of a run: alone, as it was left, and only to go on with what was begun there."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path

from learners.signals import StoppedError
from utils.checkpoint import RunFolder, RunFolderError, RunLock, sha256_of
from utils.config import Config, ConfigError

ARGS = "args.yaml"
CLASSES = "classes.json"
LOG = "output.log"

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def own_folder(config: Config) -> Iterator[RunFolder]:
    """The run folder ``--log_dir``, locked; moved aside before if ``--overwrite 1`` says so.

    What was not there before, folder or log, is gone again if the run cannot start.

    Raises:
        ConfigError: it cannot be written, is in use, is damaged, or holds a run with other settings. Nothing in
            it has changed.
    """
    root = config.log_dir
    existed = root.exists()
    had_log = (root / LOG).exists()
    try:
        with _opened(config) as folder:
            yield folder
    except (ConfigError, StoppedError):
        _remove_if_unused(root, folder=not existed, log=not had_log)
        raise


@contextlib.contextmanager
def _opened(config: Config) -> Iterator[RunFolder]:
    with contextlib.ExitStack() as stack:
        try:
            config.log_dir.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(RunLock(config.log_dir))
            folder = RunFolder(config.log_dir)
            if config.overwrite:
                _move_aside(folder, lock)
            folder.open()
            folder.newest_state()
            for name in {ARGS, CLASSES} & set(folder.files):
                folder.read(name)
            _refuse_other_settings(config, folder)
        except RunFolderError as error:
            raise ConfigError([str(error)]) from error
        except OSError as error:
            raise ConfigError([f"--log_dir {config.log_dir} cannot be made ({error.strerror})"]) from error
        yield folder


def _move_aside(folder: RunFolder, lock: RunLock) -> None:
    """Move a run aside, a damaged one too; what is no run is left alone."""
    if folder.has_manifest():
        target = lock.move_folder_aside()
        _log.info("%s moved aside to %s", folder.root, target)


def _remove_if_unused(root: Path, *, folder: bool, log: bool) -> None:
    """Remove the log, and the folder if nothing else is in it, unless a run has begun there."""
    with contextlib.suppress(OSError):
        if not RunFolder(root).has_manifest():
            if log:
                (root / LOG).unlink(missing_ok=True)
            if folder:
                root.rmdir()


def _refuse_other_settings(config: Config, folder: RunFolder) -> None:
    """A run is only resumed with the settings that it started with.

    Raises:
        ConfigError: naming the settings that differ.
    """
    changed = _changed_settings(config, folder)
    if changed and not _only_more_tasks(changed):
        raise ConfigError([
            f"--log_dir {folder.root} holds a run with other settings ({_changes(changed)}): choose another log_dir, "
            "give the old settings, or start anew with --overwrite 1, which moves the old folder aside"
        ])  # fmt: skip


def require_own_settings(config: Config, folder: RunFolder) -> None:
    """A finished run is used with the settings that it was trained with.

    Raises:
        ConfigError: naming the settings that differ.
    """
    changed = _changed_settings(config, folder)
    if changed:
        raise ConfigError([
            f"--log_dir {folder.root} holds a run with other settings ({_changes(changed)}): leave the flags that "
            "change them, or --config, out; its args.yaml has all settings"
        ])  # fmt: skip


def _changes(changed: dict[str, tuple[object, object]]) -> str:
    return ", ".join(f"{key} {before} -> {now}" for key, (before, now) in changed.items())


def _changed_settings(config: Config, folder: RunFolder) -> dict[str, tuple[object, object]]:
    """:func:`differing_settings` less weights that have only moved."""
    differing = differing_settings(config, folder)
    return {key: values for key, values in differing.items() if not _only_moved(key, config, folder)}


def differing_settings(config: Config, folder: RunFolder) -> dict[str, tuple[object, object]]:
    """What decides results and is not as it was: key -> (value of the run in the folder, of ``config``)."""
    import yaml

    if ARGS not in folder.files:
        return {}
    before, now = yaml.safe_load(folder.read(ARGS)), config.result_settings()
    return {key: (before.get(key), now[key]) for key in now if before.get(key) != now[key]}


def _only_moved(key: str, config: Config, folder: RunFolder) -> bool:
    """Whether ``key`` names weights that are, byte for byte, those that the run began with."""
    role, path = {
        "t_weights": ("teacher", config.teacher_weights), "s_weights": ("student", config.student_weights),
    }.get(key, ("", None))  # fmt: skip
    if path is None or CLASSES not in folder.files:
        return False
    return sha256_of(path) == json.loads(folder.read(CLASSES))["backbone_sha256"].get(role)


def _only_more_tasks(differing: dict[str, tuple[object, object]]) -> bool:
    """Whether ``max_task`` alone differs and is larger: it says when to stop and changes nothing else."""
    if list(differing) != ["max_task"]:
        return False
    before, now = differing["max_task"]
    return before != -1 and (now == -1 or now > before)


def is_finished(config: Config, folder: RunFolder) -> bool:
    """Whether the folder holds all that ``config`` asks for."""
    return folder.complete and not _changed_settings(config, folder)
