"""From a checked configuration to a finished run: the only place that knows all parts at once."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.checkpoint import LOCK, RunFolder, RunFolderBusyError, move_aside, run_lock
from utils.config import Config, ConfigError

if TYPE_CHECKING:
    from learners.assemble import Parts

ARGS = "args.yaml"
LOG = "output.log"

_log = logging.getLogger(__name__)


def run(config: Config) -> int:
    """Do what the configuration asks for.

    Returns:
        Exit code of the process.

    Raises:
        ConfigError: the run cannot start.
    """
    if config.action == "check_data":
        from learners.actions import check_data

        return check_data(config)
    if config.action == "train":
        if config.repeat > 1:
            from learners.repeat import run_repeats

            return run_repeats(config, train)
        return train(config)
    from learners import actions

    return actions.on_finished_run(config)


def train(config: Config) -> int:
    """Train (or go on training, or say that nothing is left to do) in ``config.log_dir``."""
    if not is_main_process():
        return _train_here(config, None)
    with _own_folder(config) as folder:
        if folder.complete:
            print(f"{config.log_dir} holds a finished run of this command; --overwrite 1 starts anew")
            return 0
        return _train_here(config, folder)


def is_main_process() -> bool:
    """Whether this process writes: the only one, or the first under torchrun."""
    import os

    return os.environ.get("RANK", "0") == "0"


@contextmanager
def _own_folder(config: Config) -> Iterator[RunFolder]:
    """The locked run folder, moved aside before if ``--overwrite 1`` says so; gone again if the run cannot start.

    Raises:
        ConfigError: it is in use, or holds a run with other settings.
    """
    root = config.log_dir
    existed = root.exists()
    root.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(run_lock(root))
            if config.overwrite and any(path.name != LOCK for path in root.iterdir()):
                stack.close()
                print(f"{root} moved aside to {move_aside(root)}")
                root.mkdir(parents=True)
                stack.enter_context(run_lock(root))
            folder = RunFolder(root)
            folder.open()
            _refuse_other_settings(config, folder)
            yield folder
        except RunFolderBusyError as error:
            raise ConfigError([str(error)]) from error
        except ConfigError:
            if not existed:
                _remove_if_unused(root)
            raise


def _remove_if_unused(root: Path) -> None:
    if not any(path.name not in (LOCK, LOG) for path in root.iterdir()):
        shutil.rmtree(root, ignore_errors=True)


def _refuse_other_settings(config: Config, folder: RunFolder) -> None:
    """A run is only resumed with the settings that it started with."""
    import yaml

    if ARGS not in folder.files:
        return
    before = yaml.safe_load(folder.read(ARGS))
    now = config.result_settings()
    differing = [key for key in now if before.get(key) != now[key]]
    if differing:
        changes = ", ".join(f"{key} {before.get(key)} -> {now[key]}" for key in differing)
        raise ConfigError([
            f"--log_dir {folder.root} holds a run with other settings ({changes}): choose another log_dir, give "
            "the old settings, or start anew with --overwrite 1, which moves the old folder aside"
        ])  # fmt: skip


def _train_here(config: Config, folder: RunFolder | None) -> int:
    """Assemble the run and train; ``folder`` is None on processes that do not write."""
    from learners.assemble import assemble
    from learners.meter import NonFiniteError
    from learners.signals import Signals, StoppedError
    from utils.checkpoint import RunFolderError
    from utils.logging import setup_logging

    setup_logging(config.log_dir / LOG if folder is not None else None, main=folder is not None)
    with Signals() as signals, assemble(config) as parts:
        try:
            _train_parts(config, folder, parts, signals)
        except StoppedError as stopped:
            _log.warning("%s", stopped)
            return stopped.exit_code
        except (NonFiniteError, RunFolderError) as error:
            _log.error("%s", error)
            return 1
        except (MemoryError, RuntimeError) as error:
            if not _out_of_memory(error):
                raise
            _log.error(
                "Out of memory (%s). The last good state is kept; the same command goes on from it. Try "
                "--accumulate %d (the same batch in smaller parts), a smaller --batch_size, or --precision bf16.",
                str(error).split("\n")[0],
                2 * config.accumulate,
            )
            return 1
    return 0


def _out_of_memory(error: BaseException) -> bool:
    text = str(error)
    return isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text


def _train_parts(config: Config, folder: RunFolder | None, parts: Parts, signals: Any) -> None:
    from learners.record import CLASSES, stream_facts
    from learners.trainer import Trainer
    from utils.logging import Progress

    log_start(config, parts)
    if folder is not None and ARGS not in folder.files:
        facts = stream_facts(parts.stream, parts.identity)
        folder.commit({ARGS: args_yaml(config, parts).encode(), CLASSES: facts})
    results = ResultFiles(config, parts)
    progress = Progress(False if config.no_progress or folder is None else None, parts.num_tasks,
                        phases=len(parts.learner.phases))  # fmt: skip
    on_epoch, close_board = _tensorboard(config) if folder is not None else (lambda *_: None, lambda: None)
    trainer = Trainer(
        parts.learner,
        parts.stream,
        parts.data,
        folder,
        parts.parallel,
        epochs=config.epochs,
        num_tasks=parts.num_tasks,
        result_files=results.files,
        progress=progress,
        signals=signals,
        log_interval=config.log_interval,
        class_weighting=config.class_weighting,
        replay=config.memory > 0,
        identity=parts.identity,
        on_epoch=on_epoch,
    )
    try:
        record = trainer.run()
    except ValueError as error:
        raise ConfigError([str(error)]) from error
    finally:
        progress.close()
        close_board()
    if folder is not None:
        results.finish(folder, record)


def _tensorboard(config: Config) -> tuple[Callable[..., None], Callable[[], None]]:
    """What to call after each epoch and at the end."""
    if not config.tensorboard:
        return (lambda *_: None), (lambda: None)
    from utils.logging import open_tensorboard

    writer = open_tensorboard(config.log_dir / "tensorboard")

    def on_epoch(role: str, task: int, epoch: int, means: dict[str, float]) -> None:
        for name, value in means.items():
            writer.add_scalar(f"{role}/{name}", value, task * config.epochs + epoch)

    return on_epoch, writer.close


def args_yaml(config: Config, parts: Parts) -> str:
    """All settings, ready to be a ``--config``; what is no setting stands in comments."""
    import yaml

    lines = ["# Everything this run was started with; python run.py --config args.yaml --log_dir ... repeats it."]
    lines += [f"# {role} backbone: {what}" for role, what in parts.backbones.items()]
    return "\n".join(lines) + "\n" + yaml.safe_dump(config.to_yaml_dict(), sort_keys=False)


def log_start(config: Config, parts: Parts) -> None:
    """Settings, versions and hardware into the log; to the console only what a person looks for."""
    import json

    from utils.logging import environment

    _log.debug("Settings: %s", json.dumps(config.to_yaml_dict()))
    _log.debug("Environment: %s", json.dumps(environment()))
    for key in config.without_effect:
        _log.warning("%s is accepted from the original's configurations and has no effect", key)
    for role, what in parts.backbones.items():
        _log.info("%s backbone: %s", role.capitalize(), what)
    _log.info(
        "%s: %d tasks, %d classes; %s + %s on %s; results in %s",
        config.dataset, parts.num_tasks, parts.stream.num_classes, config.learner_name, config.kd_method,
        parts.parallel.device, config.log_dir,
    )  # fmt: skip


class ResultFiles:
    """Makes the files of ``Results/`` from a record."""

    def __init__(self, config: Config, parts: Parts) -> None:
        self.config = config
        self.parts = parts

    def files(self, record: Any) -> dict[str, bytes]:
        return self._files(record)[0]

    def finish(self, folder: RunFolder, record: Any) -> None:
        """Pictures, the last commit, and the summary that ends the log."""
        from utils.metrics import summary_lines, summary_table
        from utils.plots import save_plots

        files, metrics = self._files(record)
        save_plots(folder.root / "Results", metrics)
        for path in sorted((folder.root / "Results").glob("*.png")):
            files[f"Results/{path.name}"] = path.read_bytes()
        folder.commit(files, complete=True)
        _log.info("\n%s\n", summary_table(metrics["teacher"], metrics["student"]))
        for line in summary_lines(metrics["student"]):
            _log.info("%s", line)

    def _files(self, record: Any) -> tuple[dict[str, bytes], dict[str, Any]]:
        from utils.logging import environment, peak_memory_mb

        parts = self.parts
        return record.files(
            settings=self.config.result_settings(),
            settings_hash=self.config.settings_hash(),
            num_tasks=parts.num_tasks,
            classes=[parts.stream.classes(task) for task in range(parts.num_tasks)],
            parameters=parts.parameter_counts(),
            environment=environment(),
            peak_memory_mb=peak_memory_mb(),
        )
