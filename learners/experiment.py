"""From a checked configuration to a finished run: the only place that knows all parts at once."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from learners.check import batch_shares
from learners.opening import ARGS, CLASSES, LOG, differing_settings, is_finished, own_folder
from learners.signals import Signals, StoppedError
from learners.teachers import TrainedTeachers
from utils.checkpoint import RunFolder, RunFolderError, sha256_of
from utils.config import Config, ConfigError

if TYPE_CHECKING:
    from learners.assemble import Parts

_log = logging.getLogger(__name__)


def run(config: Config) -> int:
    """Do what the configuration asks for.

    Returns:
        Exit code of the process.

    Raises:
        ConfigError: the run cannot start.
    """
    if config.action == "train":
        return _train_in_group(config) if "RANK" in os.environ else _train(config)
    if not is_main_process():
        return 0  # only training is shared out among processes
    from learners import actions

    return actions.check_data(config) if config.action == "check_data" else actions.on_finished_run(config)


def is_main_process() -> bool:
    """Whether this process writes: the only one, or the first under torchrun."""
    return os.environ.get("RANK", "0") == "0"


def _train_in_group(config: Config) -> int:
    """The same for a process of a torchrun group, which ends when another one is lost."""
    from utils.parallel import leave_group, lost_process

    try:
        code = _train(config)
    except RuntimeError as error:
        if not lost_process(error):
            raise
        _log.error(
            "Process %s: another process of this run is gone or does not answer (%s). The last good state is kept; "
            "the same command goes on from it, with any number of processes.",
            os.environ["RANK"], str(error).split("\n")[0],
        )  # fmt: skip
        return 1
    if code != 1:  # else the others may not come along
        leave_group()
    return code


def _train(config: Config) -> int:
    if config.repeat > 1:
        from learners.repeat import run_repeats

        return run_repeats(config, train)
    return train(config)


def train(config: Config) -> int:
    """Train (or go on training, or say that nothing is left to do) in ``config.log_dir``."""
    from utils.logging import setup_logging

    setup_logging(None, main=is_main_process())
    with Signals() as signals:
        try:
            return _train_in_folder(config, signals)
        except StoppedError as stopped:
            _log.warning("%s", stopped)
            return stopped.exit_code


def _train_in_folder(config: Config, signals: Signals) -> int:
    with ExitStack() as stack:
        folder, refusal, code = None, None, None
        if is_main_process():
            try:
                folder = stack.enter_context(own_folder(config))
                if is_finished(config, folder):
                    _say_finished(folder)
                    code = 0
                else:
                    _log_to_file(config)
            except ConfigError as error:
                refusal, code = error, 2
        code = _decision_of_main_process(config, code)
        if refusal is not None:
            raise refusal
        if code is not None:
            return code
        return _train_here(config, folder, signals)


def _say_finished(folder: RunFolder) -> None:
    _log.info("%s holds a finished run of this command; --overwrite 1 starts anew", folder.root)
    for problem in folder.damaged():
        _log.warning("%s", problem)


def _log_to_file(config: Config) -> None:
    from utils.logging import setup_logging

    logging.raiseExceptions = False  # on a full disk the run ends with a sentence, not with tracebacks of the log
    try:
        setup_logging(config.log_dir / LOG)
    except OSError as error:
        raise ConfigError([f"cannot write {config.log_dir / LOG}: {error.strerror}"]) from error


def _decision_of_main_process(config: Config, code: int | None) -> int | None:
    """The exit code that the process that owns the folder decided on, or None to train; on all processes."""
    if "RANK" not in os.environ:
        return code  # without loading torch
    from utils.parallel import build_parallel

    return build_parallel(config.device, config.gpuid).broadcast(code)


def _train_here(config: Config, folder: RunFolder | None, signals: Signals) -> int:
    """Assemble the run and train; ``folder`` is None on processes that do not write."""
    from learners.assemble import assemble
    from learners.meter import TrainingError

    try:
        with assemble(config) as parts:
            _train_parts(config, folder, parts, signals)
    except (TrainingError, RunFolderError) as error:
        _log.error("%s", error)
        return 1
    except (MemoryError, RuntimeError, OSError) as error:
        advice = _advice(error, config)
        if advice is None:
            raise
        _log.error("%s The last good state is kept. (%s)", advice, str(error).strip().split("\n")[0])
        return 1
    return 0


def _advice(error: BaseException, config: Config) -> str | None:
    """What helps against an error that the machine's limits caused; None for any other error."""
    text = str(error)
    if isinstance(error, MemoryError) or "out of memory" in text or "t allocate memory" in text:
        share = config.batch_size // batch_shares(config)[0]  # which --accumulate divides
        parts = next((n for n in range(config.accumulate + 1, share + 1) if share % n == 0), 0)
        ways = [f"--accumulate {parts}, the same batch in smaller parts"] if parts else []
        ways += ["fewer --workers"] if config.workers else []
        anew = ["a smaller --batch_size"] if config.batch_size > 1 else []
        anew += ["--precision bf16"] if config.precision in ("fp32", "tf32") else []
        choices = [f"go on with {' or '.join(ways)}"] if ways else []
        choices += [f"start a new run with {' or '.join(anew)}"] if anew else []
        return f"Out of memory: {'; or '.join(choices) or 'use a machine with more of it'}."
    if "DataLoader worker" in text or "shared memory" in text:
        return "A process that loads data was ended from outside or had too little memory: go on with fewer --workers."
    return None


def _train_parts(config: Config, folder: RunFolder | None, parts: Parts, signals: Signals) -> None:
    from learners.record import ResultFiles
    from learners.trainer import Trainer
    from utils.logging import Progress

    teachers = TrainedTeachers(config.teacher_from) if config.teacher_from is not None else None
    _begin_everywhere(config, folder, parts, teachers)
    results = ResultFiles(config, parts)
    progress = Progress(False if config.no_progress or folder is None else None, parts.num_tasks,
                        phases=len(parts.learner.phases))  # fmt: skip
    with _tensorboard(config if folder is not None else None) as on_epoch:
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
            on_epoch=on_epoch,
            teachers=teachers,
        )
        signals.finish_steps()
        try:
            record = trainer.run()
        finally:
            progress.close()
    if folder is not None:
        results.finish(folder, record)


def _begin_everywhere(config: Config, folder: RunFolder | None, parts: Parts, teachers: TrainedTeachers | None) -> None:
    """Let the process that owns the folder begin or go on; all of them stop when it must not.

    Raises:
        ConfigError: on all processes, with the problems on the first one.
    """
    refusal = None
    if folder is not None:
        log_start(config, parts)
        try:
            _begin_or_go_on(config, folder, parts, teachers)
        except ConfigError as error:
            refusal = error
    if parts.parallel.broadcast(refusal is not None):
        raise refusal if refusal is not None else ConfigError([])


def _begin_or_go_on(config: Config, folder: RunFolder, parts: Parts, teachers: TrainedTeachers | None) -> None:
    """Write down what is trained on what, or compare it with what was written.

    Raises:
        ConfigError: the data or the backbones are not those that the run, or that of ``teachers``, began with.
    """
    from learners.record import require_same, stream_facts, write_facts
    from models.original import find_original

    facts = stream_facts(parts.stream, parts.identity)
    if config.init_from is not None:
        files = {role: find_original(config.init_from, role) for role in parts.learner.phases}
        facts["init_from_sha256"] = {role: sha256_of(path) for role, path in files.items()}
    if CLASSES in folder.files:
        require_same(facts, folder)
    if teachers is not None:
        problems = teachers.problems(config) or teachers.differences(facts)
        if problems:
            raise ConfigError(problems)
    if ARGS not in folder.files or differing_settings(config, folder):
        folder.commit({ARGS: args_yaml(config, parts).encode(), CLASSES: write_facts(facts)})


@contextmanager
def _tensorboard(config: Config | None) -> Iterator[Callable[..., None]]:
    """What to call after each epoch."""
    if config is None or not config.tensorboard:
        yield lambda *_: None
        return
    from utils.logging import open_tensorboard

    writer = open_tensorboard(config.log_dir / "tensorboard")

    def on_epoch(role: str, task: int, epoch: int, means: dict[str, float]) -> None:
        for name, value in means.items():
            writer.add_scalar(f"{role}/{name}", value, task * config.epochs + epoch)

    try:
        yield on_epoch
    finally:
        writer.close()


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
