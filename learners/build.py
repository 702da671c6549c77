"""From the settings of a run to its objects: devices, backbones, data and learner."""

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException  # no public name tells a compiler's error from the block's own

from dataloaders.loader import EVAL_BATCH_SIZE, DataPipeline
from dataloaders.tasks import TaskStream, build_stream
from learners.check import cuda_devices, model_problems
from learners.distillers import DISTILLERS
from learners.distillers.base import DistillDims
from learners.learner import TeacherStudentLearner
from models.backbones import Backbone, load_backbone
from models.cdl_checkpoint import fit_checkpoint, load_checkpoint
from models.prompted_model import PromptedModel
from models.prompts import PROMPTS
from models.prompts.base import PromptDims
from models.vit import PromptedViT, run_block
from utils.config import Config, ConfigError
from utils.parallel import Parallel, cuda_problem
from utils.seed import seeded

REDUCED = {"bf16": torch.bfloat16, "fp16": torch.float16}

_log = logging.getLogger(__name__)


@dataclass
class Run:
    """The objects of a run: among them backbones by role, and the number of tasks to learn (see ``max_task``).

    ``queries`` are those of this process's test images by task, batch by batch, once they have been computed.
    """

    parallel: Parallel
    stream: TaskStream
    data: DataPipeline
    learner: TeacherStudentLearner
    backbones: dict[str, Backbone]
    num_tasks: int
    queries: dict[int, list[Tensor]] = field(default_factory=dict)


def build_run(config: Config, parallel: Parallel, resumed_dir: Path | None = None) -> Run:
    """Build all objects of a run; ``resumed_dir`` is its ``log_dir`` if it has started before.

    Raises ConfigError if data or weights are missing or damaged, or sizes do not fit.
    """
    if config.device is None and config.gpuid is None and parallel.device.type == "cpu" and cuda_devices():
        _log.warning("This run computes on the CPU although the driver lists GPUs: %s", cuda_problem((0,)))
    set_precision(config.precision)
    backbones = load_backbones(config)
    stream = build_stream(
        config.data,
        seed=config.seed,
        image_size=backbones["student"].vit.image_size,
        resumed_dir=resumed_dir,
        progress=parallel.is_main and not config.no_progress,
    )
    data = DataPipeline(stream, config.data, seed=config.seed, parallel=parallel)
    num_tasks = len(stream) if config.max_task < 0 else min(config.max_task, len(stream))
    for task in range(num_tasks):
        data.steps_per_epoch(task)  # refuses a task with fewer images than a batch before any work
    vits = {role: backbone.vit for role, backbone in backbones.items()}
    learner = build_learner(config, vits, stream.num_classes, len(stream), parallel)
    for role in learner.roles if config.init_from is not None else ():
        state = load_checkpoint(config.init_from, role)
        learner.load_state(role, fit_checkpoint(state, learner.state(role), config.init_from))
    return Run(parallel, stream, data, learner, backbones, num_tasks)


def load_backbones(config: Config) -> dict[str, Backbone]:
    """The backbones of the roles that the run has; equal ones are loaded once."""
    wanted = {"student": (config.student_model, config.student_weights)}
    if DISTILLERS[config.distill.method].needs_teacher:
        wanted = {"teacher": (config.teacher_model, config.teacher_weights)} | wanted
    normalize = config.normalize == "model"
    loaded = {key: load_backbone(key[0], weights=key[1], normalize=normalize) for key in dict.fromkeys(wanted.values())}
    if config.precision in REDUCED:
        for backbone in loaded.values():
            backbone.vit.reduce_precision(REDUCED[config.precision])
    return {role: loaded[key] for role, key in wanted.items()}


def build_learner(
    config: Config, vits: Mapping[str, PromptedViT], num_classes: int, num_tasks: int, parallel: Parallel
) -> TeacherStudentLearner:
    """Teacher, student and KD method of a configuration.

    The initial values of each part come from a random stream of its own, so equal parts start equal whatever else the
    run has. Raises ConfigError if the sizes of the backbones do not fit each other or the KD method.

    Args:
        vits: backbones by role; the student's also gives the query. A KD method without teacher ignores the teacher's.
    """
    entry, pool = DISTILLERS[config.distill.method], PROMPTS[config.learner_name]
    vits = {role: vits[role] for role in (("teacher", "student") if entry.needs_teacher else ("student",))}
    student, teacher = vits["student"], vits.get("teacher", vits["student"])  # no teacher, no use of its sizes
    if problems := model_problems(config.distill, teacher, student):
        raise ConfigError(problems)
    models = {}
    for role, vit in vits.items():
        dims = PromptDims(student.embed_dim, vit.embed_dim, vit.depth, num_tasks)
        with seeded(config.seed, "init", role):
            models[role] = PromptedModel(vit, pool.build(config, dims), num_classes)
    widths, depths = (student.embed_dim, teacher.embed_dim), (student.depth, teacher.depth)
    dims = DistillDims(*widths, *depths, num_classes, models["student"].prompt.make_head)
    with seeded(config.seed, "init", "distiller", config.distill.method):
        distiller = entry.build(config.distill, dims)
    if config.compile:
        part = config.data.batch_size // parallel.world_size // config.accumulate
        compiled = BlockCompiler((part, EVAL_BATCH_SIZE))
        for vit in vits.values():
            vit.run_block = compiled
    return TeacherStudentLearner(config, models["student"], distiller, models.get("teacher"), parallel)


def set_precision(precision: str) -> None:
    """Round the factors of float32 products on GPUs to TF32 if asked, and only then: cuDNN does so by default."""
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"


class BlockCompiler:
    """The blocks of all backbones under ``torch.compile``; if that fails, this and all later calls run without it.

    Not whole steps, as pools and classes change with the task: all graphs are made in the first one. Batches of other
    sizes than ``batch_sizes``, the rest of a test set, run uncompiled.
    """

    def __init__(self, batch_sizes: Collection[int], backend: str | Callable = "inductor") -> None:
        self.batch_sizes = batch_sizes
        self.failed = False  # mostly because there is no compiler
        # A graph for each kind of block, prompts, gradient and batch: torch stops compiling at 8. Only these names
        # work in all supported versions.
        torch._dynamo.config.cache_size_limit = torch._dynamo.config.accumulated_cache_size_limit = 10_000
        self._compiled = torch.compile(run_block, backend=backend, dynamic=False)

    def __call__(self, block: nn.Module, tokens: Tensor, *inputs: Any) -> Tensor:
        """Like :func:`models.vit.run_block`."""
        if not self.failed and len(tokens) in self.batch_sizes:
            try:
                return self._compiled(block, tokens, *inputs)
            except TorchDynamoException as error:  # an error of the block itself is raised unchanged
                self.failed = True
                while (cause := getattr(error, "inner_exception", None)) is not None:
                    error = cause
                reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
                _log.warning("continuing without --compile, because torch.compile fails: %s", reason)
        return run_block(block, tokens, *inputs)
