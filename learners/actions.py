"""What can be done without training: check the data, evaluate again, predict."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from learners.assemble import assemble, build_data
from learners.export import StudentClassifier, build_student, describe, export, load_trained_parts, refuse_foreign
from learners.meter import TrainingError
from learners.opening import CLASSES, require_own_settings
from learners.prompt import PromptLearner
from learners.record import METRICS, require_same, stream_facts
from learners.trainer import evaluate, model_file
from models.backbones import BackboneError, load_backbone
from utils.checkpoint import RunFolder, RunFolderError, from_bytes
from utils.config import Config, ConfigError
from utils.logging import setup_logging
from utils.parallel import choose_device

_log = logging.getLogger(__name__)


def check_data(config: Config) -> int:
    """Look at every image; print one JSON object; exit code 1 when one is bad or missing.

    Raises:
        ConfigError: the data set cannot be read at all.
    """
    from dataloaders.base import DataError
    from dataloaders.check import check_stream
    from models.sizes import known_size

    size = known_size(config.student_model)
    try:
        report = check_stream(build_data(config, size.image_size if size else 224), config.dataset)
    except DataError as error:
        raise ConfigError([str(error)]) from error
    json.dump(report, sys.stdout, indent=1)
    sys.stdout.write("\n")
    return 1 if report["bad"] else 0


def on_finished_run(config: Config) -> int:
    """Evaluate, export or use the models of ``config.log_dir``.

    Raises:
        ConfigError: the folder holds no finished task, or a damaged one.
    """
    setup_logging(None)
    folder = RunFolder(config.log_dir)
    try:
        folder.open(read_only=True)
        facts = json.loads(folder.read(CLASSES))
        require_own_settings(config, folder)
        if config.action == "eval_only":
            return _evaluate_again(config, folder)
        if config.action == "export":
            refuse_foreign(config.export_path)
        device = choose_device(config.device, config.gpuid)
        description = describe(config, facts, tasks_done(folder) - 1)
        classifier = _student(config, folder, description).to(device)
        if config.action == "export":
            export(classifier, description, config.export_path)
            _log.info("Wrote %s and %s", config.export_path, config.export_path.with_suffix(".json").name)
            return 0
        return _predict(classifier, config.predict_images, facts, config.top, device)
    except (RunFolderError, BackboneError) as error:
        raise ConfigError([str(error)]) from error
    except TrainingError as error:
        _log.error("%s", error)
        return 1


def tasks_done(folder: RunFolder) -> int:
    """Number of tasks whose models are saved.

    Raises:
        RunFolderError: there is none.
    """
    done = sum(name.endswith("/S_class.pth") for name in folder.files)
    if done == 0:
        raise RunFolderError(f"{folder.root} holds no learned task yet")
    return done


def load_task(learner: PromptLearner, folder: RunFolder, task: int, roles: Sequence[str]) -> None:
    """Load the models as they were after ``task`` (from 0).

    Raises:
        RunFolderError: a file is damaged or does not fit the settings.
    """
    learner.resume_task(task)
    for role in roles:
        _load(folder, model_file(role, task), partial(learner.load_state, role))


def _load(folder: RunFolder, name: str, load: Callable[[dict[str, Tensor]], None]) -> None:
    data = folder.read(name)
    try:
        load(from_bytes(data))
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise RunFolderError(f"{folder.root / name} does not fit the settings in args.yaml: {reason}") from error


def _evaluate_again(config: Config, folder: RunFolder) -> int:
    """Reproduce the accuracy matrices; exit code 1 when they differ from the recorded ones."""
    from utils.metrics import AccuracyMatrix, summary_table

    with assemble(config, alone=True) as parts:
        require_same(stream_facts(parts.stream, parts.identity), folder)
        matrices: dict[str, AccuracyMatrix] = {role: AccuracyMatrix() for role in parts.learner.phases}
        for task in range(tasks_done(folder)):
            load_task(parts.learner, folder, task, parts.learner.phases)
            rows, _ = evaluate(parts.learner, parts.stream, parts.data, parts.parallel, task)
            for role, row in rows.items():
                matrices[role].set_row(task, row)
    measured = {role: matrix.to_dict() for role, matrix in matrices.items()}
    _log.info("%s", summary_table(measured.get("teacher"), measured["student"]))
    worst = _largest_difference(measured, json.loads(folder.read(METRICS)))
    if worst < 1e-6:  # metrics.json keeps ten digits
        _log.info("The accuracy matrices equal the recorded ones.")
        return 0
    _log.warning("The accuracy matrices differ from the recorded ones by up to %.2f points.", worst)
    return 1


def _largest_difference(measured: Mapping[str, Any], recorded: Mapping[str, Any]) -> float:
    """Between the accuracy matrices of two ``metrics.json``."""
    pairs = [(measured[role]["accuracy_matrix"], recorded[role]["accuracy_matrix"]) for role in measured]
    return max(
        abs(new - old)
        for new_matrix, old_matrix in pairs
        for new_row, old_row in zip(new_matrix, old_matrix, strict=True)
        for new, old in zip(new_row, old_row, strict=True)
    )


def _student(config: Config, folder: RunFolder, description: dict[str, Any]) -> StudentClassifier:
    """The student after the last learned task."""
    backbone = load_backbone(config.student_model, weights=config.student_weights)
    require_same({"backbone_sha256": {"student": backbone.sha256}}, folder)
    classifier = build_student(description, backbone.vit)
    _load(folder, model_file("student", description["task"]), lambda state: load_trained_parts(classifier, state))
    return classifier


@torch.no_grad()
def _predict(
    classifier: StudentClassifier, images: Sequence[Path], facts: dict[str, Any], top: int, device: torch.device
) -> int:
    """Print the ``top`` classes of each image with their probabilities."""
    names = facts["class_names"]
    for path in images:
        logits = classifier(_load_image(path, facts).to(device))
        best = logits.softmax(1)[0].topk(min(top, logits.shape[1]))
        _log.info("%s", path)
        for probability, label in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            _log.info("  %6.2f %%  %s", 100 * probability, names[label])
    return 0


def _load_image(path: Path, facts: dict[str, Any]) -> Tensor:
    """One image as the student sees it in evaluation, [1, 3, H, W] in [0, 1]."""
    import numpy as np

    from dataloaders.base import DataError, read_image
    from dataloaders.transforms import EvalTransform, to_unit

    try:
        image = read_image(path)
    except DataError as error:
        raise ConfigError([f"--predict: {error}"]) from error
    pixels = np.array(EvalTransform(facts["image_size"], facts["test_crop"])(image))
    return to_unit(torch.from_numpy(pixels).permute(2, 0, 1)[None].contiguous())
