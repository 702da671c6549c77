"""Build the objects of a run: devices, backbones, data and learner."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException

from dataloaders.base import DataError
from dataloaders.build import build_stream
from dataloaders.loader import DataPipeline
from dataloaders.tasks import TaskStream
from learners.build import build_learner
from learners.check import size_problems
from learners.distillers import DISTILLERS
from learners.distillers.base import DistillSettings
from learners.optim import OptimSettings
from learners.prompt import PromptLearner
from models.backbones import Backbone, BackboneError, load_backbone
from models.original import OriginalError, fit_original, load_original
from models.sizes import ViTSize
from models.vit import PromptedViT, UnsupportedBackboneError
from utils.checkpoint import MANIFEST
from utils.config import Config, ConfigError
from utils.parallel import Parallel, build_parallel

_log = logging.getLogger(__name__)

# Test images of one forward pass. Larger batches are no faster on a CPU and hold more memory on a GPU.
EVAL_BATCH_SIZE = 128

REDUCED = {"bf16": torch.bfloat16, "fp16": torch.float16}

# More graphs than any run needs of a step with --compile: one or two for each task.
_GRAPHS = 10_000


@dataclass
class Parts:
    """Everything a run consists of.

    Attributes:
        backbones: role -> full name and SHA-256 of the weights, for the log.
        identity: the same checksums, which a resume compares.
        num_tasks: tasks to learn (``max_task`` may stop early).
    """

    parallel: Parallel
    stream: TaskStream
    data: DataPipeline
    learner: PromptLearner
    backbones: dict[str, str]
    identity: dict[str, str]
    num_tasks: int

    def parameter_counts(self) -> dict[str, dict[str, int] | None]:
        """Numbers of parameters per role, in all and trained (the student's with the KD method's)."""
        counts: dict[str, dict[str, int] | None] = {"teacher": None}
        for role, model in self.learner.models.items():
            trained = sum(tensor.numel() for tensor in self.learner.state(role).values())
            frozen = sum(p.numel() for p in model.vit.parameters())
            counts[role] = {"total": frozen + trained, "trained": trained}
        return counts


@contextlib.contextmanager
def assemble(config: Config, *, alone: bool = False) -> Iterator[Parts]:
    """Build a run, and take it apart at the end of the block (worker processes).

    Args:
        config: what to build.
        alone: in this process only, also under torchrun.

    Raises:
        ConfigError: data or weights are missing or damaged, sizes do not fit, or the processes differ.
    """
    parts = _build_everywhere(config, build_parallel(config.device, config.gpuid, alone=alone))
    try:
        yield parts
    except DataError as error:
        raise ConfigError([str(error)]) from error
    finally:
        parts.data.close()


def load_backbones(config: Config) -> dict[str, Backbone]:
    """The backbones of the roles that the run has; equal ones are loaded once."""
    wanted = {"student": (config.student_model, config.student_weights)}
    if DISTILLERS.load(config.kd_method).needs_teacher:
        wanted = {"teacher": (config.teacher_model, config.teacher_weights)} | wanted
    loaded: dict[tuple, Backbone] = {}
    for name, weights in wanted.values():
        if (name, weights) not in loaded:
            backbone = load_backbone(name, weights=weights)
            if config.precision in REDUCED:
                backbone.vit.reduce_precision(REDUCED[config.precision])
            loaded[name, weights] = backbone
    return {role: loaded[key] for role, key in wanted.items()}


def build_data(config: Config, image_size: int, *, may_write: bool = True) -> TaskStream:
    """The task stream of a configuration for images of ``image_size`` pixels.

    Args:
        config: names the data.
        image_size: of the student's backbone.
        may_write: write a split that had to be drawn to the log_dir; False on all processes but the first, which
            draw the same one, or read it when they resume.
    """
    log_dir = config.log_dir
    if not may_write and log_dir is not None and not (log_dir / MANIFEST).exists():
        log_dir = None
    return build_stream(
        dataset=config.dataset,
        dataroot=config.dataroot,
        image_size=image_size,
        first_split_size=config.first_split_size,
        other_split_size=config.other_split_size,
        class_order=config.class_order,
        seed=config.seed,
        validation=config.validation,
        upper_bound=config.upper_bound,
        memory=config.memory,
        train_aug=config.train_aug,
        crop_scale=config.crop_scale,
        data_url=config.data_url,
        log_dir=log_dir,
        progress=may_write and not config.no_progress,
    )


def make_learner(
    config: Config, backbones: dict[str, Backbone], num_classes: int, num_tasks: int, parallel: Parallel
) -> PromptLearner:
    """Teacher, student and KD method of a configuration."""
    vits = {role: backbone.vit for role, backbone in backbones.items()}
    _check_sizes(config, vits)
    try:
        return build_learner(
            learner_name=config.learner_name,
            prompt_param=config.prompt_param,
            kd_method=config.kd_method,
            distill=DistillSettings(config.kd_alpha, config.temperature, *config.kd_prompt_param),
            teacher_vit=vits.get("teacher"),
            student_vit=vits["student"],
            num_classes=num_classes,
            num_tasks=num_tasks,
            optim=OptimSettings(
                config.optimizer, config.lr, config.momentum, config.weight_decay, config.schedule_type,
                config.schedule,
            ),
            aux_loss_scale=config.aux_loss_scale,
            seed=config.seed,
            parallel=parallel,
            accumulate=config.accumulate,
            compile_step=compiled if config.compile else None,
        )  # fmt: skip
    except ValueError as error:  # a pool that cannot be built
        raise ConfigError([f"--prompt_param of {config.learner_name}: {error}"]) from error


def compiled(step: nn.Module, backend: str | Callable = "inductor") -> nn.Module:
    """The step under ``torch.compile``; if that fails, this and all later steps of the process run as they are."""
    # A pool that reads its task's number, or another shape, gives another graph. Beyond 8 of them torch would go on
    # without compiling, and only tell the standard error. These names are the ones that all supported versions know.
    torch._dynamo.config.cache_size_limit = _GRAPHS
    torch._dynamo.config.accumulated_cache_size_limit = _GRAPHS
    return _Compiled(step, backend)


class _Compiled(nn.Module):
    """Compiles at the first call, and again for each new shape and task.

    A step changes nothing but the random state, so one whose compilation fails can begin again. What some backends
    compile later, in the backward pass, is not caught.
    """

    failed = False  # in this process: what one step lacks, a compiler mostly, all of them lack

    def __init__(self, step: nn.Module, backend: str | Callable) -> None:
        super().__init__()
        self.step = step
        # Not the module, which would hold the step's parameters a second time under other names.
        self._run = torch.compile(step.forward, backend=backend)

    def forward(self, *inputs):
        if not _Compiled.failed:
            try:
                return self._run(*inputs)
            except TorchDynamoException as error:  # an error of the step itself comes as it is
                _Compiled.failed = True
                _log.warning("--compile is left out from here on, as torch.compile fails: %s", _reason(error))
        return self.step(*inputs)


def _reason(error: Exception) -> str:
    """The first line of what is at the bottom of an error of the compiler."""
    while (inner := getattr(error, "inner_exception", None)) is not None:
        error = inner
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def set_precision(precision: str) -> None:
    """Round the factors of float32 products on GPUs to TF32 if asked, and only then: cuDNN does so by default."""
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"


def _build_everywhere(config: Config, parallel: Parallel) -> Parts:
    """Build on every process; all of them stop when one cannot, or would compute something else.

    Raises:
        ConfigError: on all processes, with the problems on the first one.
    """
    problems: list[str] = []
    facts: dict[str, object] = {}
    try:
        parts = _build(config, parallel)
        facts = {
            "settings": config.settings_hash(),
            "backbones": parts.identity,
            "classes": parts.stream.class_names,
            "numbers of images": _numbers_of_images(parts.stream),
            # decide no result, but when the processes exchange something
            "--log_interval": config.log_interval,
            "--repeat": config.repeat,
            "--teacher_from": config.teacher_from is not None,
        }
    except ConfigError as error:
        problems = error.problems
    except (DataError, BackboneError, OriginalError, UnsupportedBackboneError) as error:
        problems = [str(error)]
    everyones = parallel.gather((problems, facts))
    if parallel.rank == 0:
        for rank, (theirs, _) in enumerate(everyones):
            problems += [f"process {rank}: {problem}" for problem in theirs if problem not in problems]
        problems = problems or _differences([facts for _, facts in everyones])
    if parallel.broadcast(bool(problems)):
        raise ConfigError(problems if parallel.rank == 0 else [])
    return parts


def _numbers_of_images(stream: TaskStream) -> list[tuple[int, int]]:
    """For training and test, per task."""
    return [(stream.train_size(task), stream.test_size(task)) for task in range(len(stream))]


def _differences(facts: list[dict[str, object]]) -> list[str]:
    """One sentence for each process that does not have what the first has."""
    return [
        f"process {rank} has other {' and '.join(other)} than process 0: all machines need the same files and flags"
        for rank, own in enumerate(facts)
        if (other := [name for name in own if own[name] != facts[0].get(name)])
    ]


def _build(config: Config, parallel: Parallel) -> Parts:
    if config.device == "mps" and not torch.backends.mps.is_available():
        raise ConfigError(["--device mps: this torch or this Mac has no mps; use --gpuid -1 for the CPU"])
    set_precision(config.precision)
    backbones = load_backbones(config)
    image_size = backbones["student"].vit.image_size
    stream = build_data(config, image_size, may_write=parallel.rank == 0)
    learner = make_learner(config, backbones, stream.num_classes, len(stream), parallel)
    if config.init_from is not None:
        for role in learner.phases:
            state = load_original(config.init_from, role)
            learner.load_state(role, fit_original(state, learner.state(role), config.init_from))
    data = DataPipeline(
        stream,
        batch_size=config.batch_size,
        eval_batch_size=EVAL_BATCH_SIZE,
        workers=config.workers,
        pin_memory=parallel.device.type == "cuda",
        seed=config.seed,
        rank=parallel.rank,
        world_size=parallel.world_size,
        device=parallel.device,
    )
    num_tasks = len(stream) if config.max_task < 0 else min(config.max_task, len(stream))
    for task in range(num_tasks):
        data.steps_per_epoch(task)  # a task with fewer images than a batch is refused before any work
    return Parts(
        parallel=parallel,
        stream=stream,
        data=data,
        learner=learner,
        backbones={role: f"{b.tag} (sha256 {b.sha256})" for role, b in backbones.items()},
        identity={role: b.sha256 for role, b in backbones.items()},
        num_tasks=num_tasks,
    )


def _check_sizes(config: Config, vits: dict[str, PromptedViT]) -> None:
    """The checks that the names alone did not allow."""
    sizes = {role: _size(vit) for role, vit in vits.items()}
    problems = size_problems(config.kd_method, config.kd_prompt_param, sizes.get("teacher"), sizes["student"])
    if problems:
        raise ConfigError(problems)


def _size(vit: PromptedViT) -> ViTSize:
    patch = vit.vit.patch_embed.patch_size[0]
    return ViTSize(vit.embed_dim, vit.depth, vit.num_heads, vit.image_size, patch, vit.num_tokens)
