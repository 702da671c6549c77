"""A training run, from its folder to its results."""

import contextlib
import json
import logging
import os

from dataloaders.base import BadImageError
from learners import results
from learners.build import Run, build_run
from learners.meter import TrainingError
from learners.repeat import discard_summary, run_repeats
from learners.signals import Signals, StoppedError
from learners.teacher_cache import TeacherCache
from learners.trainer import Trainer
from utils.checkpoint import LOG, METRICS, RunFolder, RunFolderError, differing_settings, is_finished, open_run
from utils.config import Config
from utils.logging import Progress, environment, open_trackers, setup_logging
from utils.parallel import build_parallel, is_main_process, leave_group, lost_process

_log = logging.getLogger(__name__)


def run(config: Config) -> int:
    """Train with one seed or, with ``--repeat``, several; returns the exit code, as :func:`train` does."""
    code = run_repeats(config, train) if config.repeat > 1 else train(config)
    if code != 1:  # otherwise the other processes may not get here
        leave_group()
    return code


def train(config: Config) -> int:
    """Train what ``config.log_dir`` does not hold yet: open the folder, build data and models, learn, write results.

    Returns 0 when the run is complete, 1 when it ended early with its last good state saved, 128 + n after signal n;
    a ConfigError says why it cannot start, and nothing has changed.
    """
    setup_logging(None, main=is_main_process())
    try:
        with Signals() as signals, contextlib.ExitStack() as stack:
            parallel = build_parallel(config.device, config.gpuid)
            folder = parallel.all_or_none(lambda: stack.enter_context(open_run(config)) if parallel.is_main else None)
            if parallel.broadcast(folder is not None and _finished(config, folder)):
                return 0
            state = parallel.all_or_none(lambda: folder.load_state() if folder else None)
            resumed_dir = config.log_dir if parallel.broadcast(folder is not None and folder.has_run) else None
            objects = parallel.all_or_none(lambda: build_run(config, parallel, resumed_dir))
            stack.callback(objects.data.close)
            info = parallel.all_or_none(lambda: results.data_info(config, objects))
            parallel.all_or_none(lambda: results.check_processes(config, parallel, info))
            teachers = parallel.all_or_none(lambda: _begin(config, objects, info, folder, state) if folder else None)
            bars = None if folder and not config.no_progress else False
            progress = Progress(bars, objects.num_tasks, roles=objects.learner.roles)
            stack.callback(progress.close)
            asked = {"tensorboard": folder and config.tensorboard, "wandb": folder and config.wandb}
            trackers = open_trackers(config.log_dir, config.settings_hash(), config.result_settings(), **asked)
            trainer = Trainer(config, objects, folder, signals, progress, stack.enter_context(trackers), teachers)
            signals.finish_steps()
            trainer.learn(parallel.broadcast(state))
            if folder:
                results.log_summary(folder)
            if signals.stop:
                raise StoppedError(signals.stop)
            return 0
    except StoppedError as stopped:
        _log.warning("%s", stopped)
        return stopped.exit_code
    except BadImageError:
        results.forget_images(RunFolder(config.log_dir))  # from any process, as only one of them knows
        raise
    except (TrainingError, RunFolderError) as error:
        _log.error("%s", error)
    except (MemoryError, RuntimeError, OSError) as error:
        advice = _advice(error)
        if advice is None:
            raise
        _log.error("%s The last good state is kept. (%s)", advice, str(error).strip().split("\n")[0])
    return 1


def _finished(config: Config, folder: RunFolder) -> bool:
    """Whether nothing is left to do, which is then logged; otherwise the log goes to a file from now on."""
    if not is_finished(config):
        setup_logging(config.log_dir / LOG)
        return False
    _log.info("%s holds a finished run of this command; --overwrite 1 starts over", folder.root)
    try:
        results.check_models(folder, folder.read_json(METRICS)["tasks_done"])
    except RunFolderError as error:
        _log.warning("%s", error)
    return True


def _begin(config: Config, objects: Run, info: dict, folder: RunFolder, state: dict | None) -> TeacherCache | None:
    """Record what is trained on what, or compare it with what the run recorded; find the teachers."""
    _log_start(config, objects)
    if folder.has_run:
        results.check_same_data(info, folder)
        results.check_models(folder, state["position"][0] if state else 0)
        results.write_classes(folder, info)  # with the digest of the images, if a damaged one was replaced
    teachers = TeacherCache(config, info) if config.teacher_from is not None else None
    if not folder.has_run or differing_settings(config):
        results.write_start(folder, config, objects, info)
        discard_summary(config)
    return teachers


def _log_start(config: Config, objects: Run) -> None:
    """Log settings, versions and hardware; the console shows only what a person looks for."""
    _log.debug("Settings: %s", json.dumps(config.to_yaml_dict()))
    _log.debug("Environment: %s", json.dumps(environment()))
    if keys := config.without_effect:
        _log.warning("accepted from the original's configurations, without effect: %s", ", ".join(keys))
    in_parts = config.accumulate > 1 or objects.parallel.world_size > 1 or len(config.gpuid or ()) > 1
    if in_parts and not objects.learner.distiller.mean_over_images:
        only = "here only those of the same device and part of a batch (--gpuid, --accumulate)"
        _log.warning("%s compares images with each other, %s", config.distill.method, only)
    for role, backbone in objects.backbones.items():
        _log.info("%s: %s (sha256 %s)", role.capitalize(), backbone.tag, backbone.sha256)
    seen, classes = objects.stream.classes(objects.num_tasks - 1).stop, objects.stream.num_classes
    _log.info(
        f"{config.data.dataset}: {objects.num_tasks} {'task' if objects.num_tasks == 1 else 'tasks'},"
        f" {classes if seen == classes else f'{seen} of {classes}'} classes; {config.learner_name}"
        f" + {config.distill.method} on {objects.parallel.device}"
    )


def _advice(error: BaseException) -> str | None:
    """Advice on an error that the machine's limits caused; None for any other error."""
    text = str(error)
    if "RANK" in os.environ and isinstance(error, RuntimeError) and lost_process(error):
        return (
            f"Process {os.environ['RANK']}: another process of this run is gone or does not answer. The same command "
            "resumes the run, with any number of processes."
        )
    if isinstance(error, MemoryError) or "out of memory" in text or "t allocate memory" in text:
        return (
            "Out of memory: resume with a larger --accumulate, the same batch in smaller parts, or fewer --workers; or "
            "start a new run with a smaller --batch_size or --precision bf16."
        )
    if "DataLoader worker" in text or "shared memory" in text:
        return "A process that loads data was ended from outside or had too little memory: resume with fewer --workers."
    return None
