"""Evaluate models: after each task of a run, and again from the files of a run; name what images show."""

import itertools
import json
import logging
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dataloaders.base import DataError, read_image
from dataloaders.check import check_stream
from dataloaders.folders import find_images
from dataloaders.tasks import build_stream
from dataloaders.transforms import EvalTransform, to_planes, to_unit
from learners.build import Run, build_run
from learners.export import export, trained_student
from learners.meter import NonFiniteError, TrainingError
from learners.results import check_same_data, data_info, load_model, tasks_done
from models.sizes import known_size
from utils.checkpoint import METRICS, RunFolder, RunFolderError, check_settings
from utils.config import Config, ConfigError
from utils.logging import setup_logging
from utils.metrics import measure, summary_table
from utils.parallel import build_parallel, is_main_process

_log = logging.getLogger(__name__)


@torch.inference_mode()
def evaluate(run: Run, task: int, between: Callable[[], None] = lambda: None) -> tuple[dict, dict]:
    """Measure the models after ``task`` (from 0), and call ``between`` now and then, in all processes equally often.

    Returns:
        By role the accuracies (%) on tasks 0 … ``task``, top 1 over all classes seen; and by role and layer the mean
        use of the pool's entries by the test images of ``task``. Raises NonFiniteError if a logit is not finite.
    """
    step, parallel = run.learner.evaluator(), run.parallel
    seen = run.stream.classes(task).stop
    rows: dict[str, list[float]] = {role: [] for role in run.learner.roles}
    totals = torch.zeros(task + 1, len(rows) + 1, dtype=torch.int64, device=parallel.device)
    batches = run.data.test(*range(task + 1))
    for past in range(task + 1):
        queries = run.queries.setdefault(past, [])  # no training changes them
        for index, (images, targets) in enumerate(itertools.islice(batches, run.data.test_steps(past))):
            result = step(images, targets, seen, queries[index] if index < len(queries) else None)
            if index == len(queries) and result.query is not None:
                queries.append(result.query)
            # One element for each replica.
            totals[past] += torch.stack([*(result.correct[role].sum() for role in rows), result.not_finite.sum()])
            if parallel.world_size == 1:
                between()
        if parallel.world_size > 1:
            between()
    for past, (*counts, not_finite) in enumerate(parallel.sum(totals).tolist()):
        if not_finite:
            raise NonFiniteError(
                f"after task {task + 1}, logits of task {past + 1}'s test images are not finite ({not_finite} of "
                "them): start over with --precision fp32 or bf16, or a lower --lr"
            )
        for role, count in zip(rows, counts, strict=True):
            rows[role].append(100 * count / run.stream.test_size(past))
    return rows, _usage(run, task)


def _usage(run: Run, task: int) -> dict[str, dict[str, list[float]]]:
    usage: dict[str, dict[str, list[float]]] = {role: {} for role in run.learner.roles}
    if not run.learner.student.prompt.needs_query:
        return usage
    parallel = run.parallel
    no_image = torch.zeros(0, run.learner.query_vit.embed_dim, device=parallel.device)  # a process may have none
    queries = torch.cat([no_image, *(query.float() for query in run.queries[task])])
    for role, model in run.learner.models.items():
        for layer, total in model.prompt.usage(queries).items():
            usage[role][layer] = (parallel.sum(total).cpu().double() / run.stream.test_size(task)).tolist()
    return usage


def run(config: Config) -> int:
    """Check data, or evaluate, export or use the models of ``config.log_dir``; returns the exit code.

    Of several processes the main one does all of it. Raises ConfigError if the data cannot be read, or if the folder
    holds no finished task or a damaged one.
    """
    if not is_main_process():
        return 0
    setup_logging(None)
    actions = {"check_data": _check_data, "eval_only": _evaluate_again, "export": _export, "predict": _predict}
    try:
        return actions[config.action](config)
    except RunFolderError as error:
        raise ConfigError([str(error)]) from error
    except TrainingError as error:
        _log.error("%s", error)
        return 1


def _check_data(config: Config) -> int:
    """Look at every image; print one JSON object; exit code 1 when an image is bad or missing."""
    size = known_size(config.student_model)
    stream = build_stream(config.data, seed=config.seed, image_size=size.image_size if size else 224)
    report = check_stream(stream, config.data.dataset)
    sys.stdout.write(json.dumps(report, indent=1) + "\n")
    return 1 if report["bad"] else 0


def _evaluate_again(config: Config) -> int:
    """Reproduce the accuracy matrices; exit code 1 when they differ from the recorded ones."""
    check_settings(config, resume=False)
    folder = RunFolder(config.log_dir)
    run = build_run(config, build_parallel(config.device, config.gpuid, alone=True), folder.root)
    learner = run.learner
    check_same_data(data_info(config, run), folder)
    matrices: dict[str, list[list[float]]] = {role: [] for role in learner.roles}
    for task in range(tasks_done(folder)):
        learner.resume_task(task)
        for role in learner.roles:
            load_model(folder, role, task, partial(learner.load_state, role))
        rows, _ = evaluate(run, task)
        for role, row in rows.items():
            matrices[role].append(row)
    run.data.close()
    measured = {role: measure(rows) for role, rows in matrices.items()}
    recorded = folder.read_json(METRICS)
    _log.info("%s", summary_table(measured.get("teacher"), measured["student"]))
    pairs = [(rows, recorded[role]["accuracy_matrix"]) for role, rows in matrices.items()]
    worst = max(np.abs(np.concatenate(new) - np.concatenate(old)).max() for new, old in pairs)
    if worst < 1e-6:  # metrics.json keeps ten digits
        _log.info("The accuracy matrices equal the recorded ones.")
        return 0
    _log.warning("The accuracy matrices differ from the recorded ones by up to %.2f points.", worst)
    return 1


def _export(config: Config) -> int:
    """Write the student after the last learned task for use elsewhere."""
    export(*trained_student(config), config.export)
    _log.info("Wrote %s and %s", config.export, config.export.with_suffix(".json").name)
    return 0


@torch.no_grad()
def _predict(config: Config) -> int:
    """Print the ``--top`` classes of each image with their probabilities."""
    device = build_parallel(config.device, config.gpuid, alone=True).device
    classifier, metadata = trained_student(config)
    classifier.to(device)
    try:
        for path in itertools.chain(*map(_images_of, config.predict)):
            logits = classifier(_load_image(path, metadata).to(device))
            best = logits.softmax(1)[0].topk(min(config.top, logits.shape[1]))
            _log.info("%s", path)
            for probability, label in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                _log.info("  %6.2f %%  %s", 100 * probability, metadata["class_names"][label])
    except DataError as error:
        raise ConfigError(f"--predict: {error}") from error
    return 0


def _images_of(path: Path) -> list[Path]:
    """A file itself, or all images in and below a folder."""
    if not path.is_dir():
        return [path]
    if found := [path / name for name in find_images(path, ".")]:
        return found
    raise DataError(f"there is no image in {path}")


def _load_image(path: Path, metadata: Mapping[str, Any]) -> Tensor:
    """One image as the student sees it in evaluation, [1, 3, H, W] in [0, 1]."""
    size = metadata["image_size"]
    pixels = np.empty((1, 3, size, size), dtype=np.uint8)
    to_planes(EvalTransform(size, metadata["test_crop"])(read_image(path)), pixels[0])
    return to_unit(torch.from_numpy(pixels))
