"""The measurements of a run, the files of ``Results/`` made from them, and what the folder says of its models."""

import contextlib
import hashlib
import json
import logging
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml
from torch import Tensor

from learners.build import Run
from learners.speed import speed_by_phase
from models.cdl_checkpoint import find_checkpoint
from utils.checkpoint import ARGS, ARGS_END, CLASSES, METRICS, RunFolder, RunFolderError, from_bytes, sha256_of
from utils.config import Config, ConfigError, plain
from utils.logging import environment, peak_memory_mb
from utils.metrics import FORMAT, acc_csv, measure, metrics_json, summary_lines, summary_table
from utils.parallel import Parallel

IMAGES = "images_sha256"  # in classes.json
TIMING = "Results/timing.json"

_log = logging.getLogger(__name__)


@dataclass
class History:
    """Measurements by role (``teacher``, ``student``) and task.

    Attributes:
        accuracy: rows of each role's accuracy matrix, %.
        losses: per task, per epoch, mean of each term.
        usage: per task, how much each pool entry is used, by layer.
        phases: of each training of a role on a task and each evaluation: seconds, those waited for data, and images.
        speed: FLOPs per image by phase, and ``product``, FLOP/s of a large product on all devices (learners/speed.py).
    """

    accuracy: dict[str, list[list[float]]] = field(default_factory=dict)
    losses: dict[str, list[list[dict[str, float]]]] = field(default_factory=dict)
    usage: dict[str, list[dict[str, list[float]]]] = field(default_factory=dict)
    phases: list[dict[str, Any]] = field(default_factory=list)
    speed: dict[str, float] = field(default_factory=dict)

    def add_epoch(self, role: str, task: int, epoch: int, means: Mapping[str, float]) -> None:
        """Enter an epoch's losses; an epoch that is repeated replaces its earlier entry."""
        tasks = self.losses.setdefault(role, [])
        tasks[task:] = [*tasks[task : task + 1], []][:1]
        tasks[task][epoch:] = [dict(means)]

    def add_time(self, task: int, phase: str, seconds: float, waited: float, images: int) -> None:
        """Add an epoch, or an evaluation, to the time of a phase."""
        if not self.phases or (self.phases[-1]["task"], self.phases[-1]["phase"]) != (task, phase):
            self.phases.append(dict(task=task, phase=phase, epochs=0, seconds=0.0, waited_for_data=0.0, images=0))
        entry = self.phases[-1]
        for name, more in dict(epochs=1, seconds=seconds, waited_for_data=waited, images=images).items():
            entry[name] += more
        entry["images_per_second"] = entry["images"] / max(entry["seconds"], 1e-9)

    def add_evaluation(self, task: int, rows: Mapping, usage: Mapping) -> None:
        """Enter the results after a task: accuracies on all tasks seen, and the use of the pools, by role."""
        for role, row in rows.items():
            self.accuracy.setdefault(role, [])[task:] = [row]
            self.usage.setdefault(role, [])[task:] = [usage[role]]


def build_metrics(config: Config, run: Run, history: History) -> dict[str, Any]:
    """The content of ``metrics.json``: equal results give equal content, without times, folders or versions."""
    settings, stream, defaults = config.result_settings(), run.stream, plain(config.distill.param_defaults)
    matrices = {role: measure(rows) for role, rows in history.accuracy.items()}
    done = len(history.accuracy["student"])
    names = json.dumps(sorted(stream.class_names), ensure_ascii=False)
    return {
        "format": FORMAT,
        "complete": done == run.num_tasks,
        **{key: settings[key] for key in ("dataset", "learner_name", "KD_method", "t_model", "s_model")},
        "kd_param": {name: x for name, x in settings["kd_param"].items() if x != defaults[name]},
        "seed": config.seed,
        "settings": settings,
        "settings_hash": config.settings_hash(),
        "num_tasks": run.num_tasks,
        "stream_tasks": len(stream),  # more where --max_task cuts the run
        "tasks_done": done,
        "classes": [list(stream.classes(task)) for task in range(run.num_tasks)],
        "data": {  # differs for another data set of the same name, but not for another seed or order of classes
            "split": stream.split,
            "classes": stream.num_classes,
            "class_names_sha256": hashlib.sha256(names.encode(errors="backslashreplace")).hexdigest(),
            "train_images": len(stream.train_images.used),
            "test_images": len(stream.test_images.used),
        },
        "teacher": matrices.get("teacher"),
        "student": matrices["student"],
        "parameters": run.learner.parameter_counts(),
        "losses": history.losses,
        "prompt_usage": history.usage,
        "prompts_per_task": run.learner.student.prompt.per_task,
    }


def write_results(folder: RunFolder, config: Config, run: Run, history: History) -> None:
    """Write the files of ``Results/`` after a task, with pictures after the last one; ``metrics.json`` comes last."""
    text = metrics_json(build_metrics(config, run, history))
    metrics = json.loads(text)  # pictures show the rounded numbers, so that they can be drawn again from the file
    timing = {
        "phases": history.phases,
        "speed": speed_by_phase(history.phases, history.speed),
        "product_tflop_per_second": history.speed["product"] / 1e12,
        "total_seconds": sum(entry["seconds"] for entry in history.phases),
        "peak_memory_mb": peak_memory_mb(),
        **environment(),
    }
    for phase, x in timing["speed"].items():
        _log.debug(
            f"Speed of {phase}: {x['images_per_second']:.1f} images/s of {x['gflop_per_image']:.3g} GFLOP,"
            f" {x['tflop_per_second']:.3g} TFLOP/s, {x['share_of_product']:.2f} of a large product's rate (MFU);"
            f" {x['waited_for_data']:.1f} of {x['seconds']:.1f} s waited for data"
        )
    folder.write(TIMING, (json.dumps(timing, indent=1) + "\n").encode())
    for role in history.accuracy:
        name = "acc_s" if role == "student" else "acc"
        folder.write(f"Results/{name}.csv", acc_csv(metrics[role]["average_accuracy"]).encode())
    if metrics["complete"]:
        from utils import plots  # here, as it loads matplotlib

        for name, picture in plots.draw(metrics).items():
            folder.write(f"Results/{name}", picture)
    folder.write(METRICS, text.encode())


def model_file(role: str, task: int) -> str:
    """Where the trained parts of a model after ``task`` (from 0) are, under the original's names."""
    return f"models/task-{task + 1}/{role[0].upper()}_class.pth"


def load_model(folder: RunFolder, role: str, task: int, load: Callable[[dict[str, Tensor]], None]) -> None:
    """Hand the trained parts of a model after ``task`` to ``load``; RunFolderError if they do not fit the settings."""
    name = model_file(role, task)
    data = folder.read(name)
    try:
        load(from_bytes(data))
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise RunFolderError(f"{folder.root / name} does not fit the settings in args.yaml: {reason}") from error


def check_models(folder: RunFolder, tasks: int) -> None:
    """Read the models of the first ``tasks`` tasks; a RunFolderError names one that is damaged or missing."""
    for role in folder.read_json(CLASSES)["backbone_sha256"]:
        for task in range(tasks):
            folder.read(model_file(role, task))


def tasks_done(folder: RunFolder) -> int:
    """Number of tasks whose models and results are saved (raises RunFolderError where there is none)."""
    if not (folder.root / METRICS).exists():
        raise RunFolderError(f"{folder.root} holds no learned task yet")
    return folder.read_json(METRICS)["tasks_done"]


def log_summary(folder: RunFolder) -> None:
    """Log the table of measures and what to do next; in output.log the original's summary lines follow."""
    metrics, place = folder.read_json(METRICS), shlex.quote(str(folder.root))
    _log.info("\n%s\n", summary_table(metrics["teacher"], metrics["student"]))
    _log.info("Accuracies, pictures and models are in %s. Next, for example:", folder.root)
    _log.info("  python run.py --log_dir %s --predict IMAGES\n  python -m utils.report %s", place, place)
    for line in summary_lines(metrics["student"]):
        _log.debug("%s", line, extra={"bare": True})


def data_info(config: Config, run: Run) -> dict[str, Any]:
    """The content of ``classes.json``: what the use of a student without its data needs, and what identifies both."""
    stream, tasks = run.stream, range(len(run.stream))
    info = {
        "num_classes": stream.num_classes,
        "num_tasks": len(stream),
        "ranges": [list(stream.classes(task)) for task in tasks],
        "class_names": list(stream.class_names),
        "image_size": stream.image_size,
        "test_crop": stream.test_transform.crop,
        "train_images": [stream.train_size(task) for task in tasks],
        "test_images": [stream.test_size(task) for task in tasks],
        IMAGES: stream.digest(),
        "backbone_sha256": {role: backbone.sha256 for role, backbone in run.backbones.items()},
    }
    if config.init_from is not None:
        files = {role: find_checkpoint(config.init_from, role) for role in run.learner.roles}
        info["init_from_sha256"] = {role: sha256_of(path) for role, path in files.items()}
    return info


def check_processes(config: Config, parallel: Parallel, info: Mapping[str, Any]) -> None:
    """Compare what the processes of a group are about to compute; ``info`` is this one's :func:`data_info`.

    A ConfigError has a sentence for each process that would compute something else than the first.
    """
    mine = {"settings": config.settings_hash(), **info}
    # These affect no result, but they decide when the processes exchange something.
    mine |= {"--log_interval": config.log_interval, "--repeat": config.repeat}
    mine["--teacher_from"] = config.teacher_from is not None
    everyones = parallel.gather(mine)
    problems = [
        f"process {rank} has other {' and '.join(other)} than process 0: all machines need the same files and flags"
        for rank, theirs in enumerate(everyones)
        if (other := [name for name in theirs if theirs[name] != everyones[0][name]])
    ]
    if problems:
        raise ConfigError(problems)


def write_start(folder: RunFolder, config: Config, run: Run, info: Mapping[str, Any]) -> None:
    """Write what is trained on what: ``classes.json`` (``info``), and all settings, ready to be a ``--config``."""
    lines = ["# Everything this run was started with; python run.py --config args.yaml --log_dir ... repeats it."]
    lines += [f"# {role} backbone: {each.tag} (sha256 {each.sha256})" for role, each in run.backbones.items()]
    args = "\n".join(lines) + "\n" + yaml.safe_dump(config.to_yaml_dict(), sort_keys=False) + ARGS_END
    for name, data in run.stream.drawn_split.items():
        folder.write(name, data)
    write_classes(folder, info)
    folder.write(ARGS, args.encode())  # last, as it makes the folder that of a run


def write_classes(folder: RunFolder, info: Mapping[str, Any]) -> None:
    """Write ``classes.json``; bytes of names that are not UTF-8 become ``\\udc..``, as JSON writes them."""
    folder.write(CLASSES, (json.dumps(info, ensure_ascii=False, indent=1) + "\n").encode(errors="backslashreplace"))


def forget_images(folder: RunFolder) -> None:
    """Let the next resume take other image files, because a damaged one is to be replaced."""
    with contextlib.suppress(RunFolderError):  # it has no run yet
        write_classes(folder, folder.read_json(CLASSES) | {IMAGES: ""})


def check_same_data(info: Mapping[str, Any], folder: RunFolder) -> None:
    """Compare (a part of) a :func:`data_info` with the one that a run wrote down; a ConfigError names what differs."""
    before = folder.read_json(CLASSES)
    compared = [key for key in info if key != "backbone_sha256" and (key != IMAGES or before.get(key))]
    problems = [f"{key} differ" for key in compared if before.get(key) != info[key]]
    for role, digest in info["backbone_sha256"].items():
        was = before["backbone_sha256"].get(role)
        if was != digest:
            problems.append(f"the SHA-256 of the {role}'s backbone was {was} and is {digest}, see --{role[0]}_weights")
    if problems:
        differences = f"--log_dir {folder.root} holds a run on other data or backbones ({'; '.join(problems)})"
        raise ConfigError([f"{differences}: use the same files, or another log_dir"])
