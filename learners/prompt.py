"""The two phases of continual distillation, teacher then student, and their evaluation (SPEC sections 1 to 5)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from dataloaders.tasks import ClassRange
from learners.distillers.base import Distiller
from learners.optim import OptimSettings, build_optimizer, learning_rate, set_learning_rate
from learners.steps import LOSS, EvalStep, Step, StudentStep, TeacherStep
from models.prompted_model import PromptedModel
from models.vit import PromptedViT
from utils.parallel import Parallel, SingleDevice
from utils.seed import generator

GRADIENT = "gradient"


class PromptLearner:
    """Teacher, student and KD method of one run.

    It knows phases and steps, but neither data sets nor files; what is a teacher's or a student's prompt pool
    or a KD method is the business of the objects it is given.

    Args:
        student: frozen backbone, pool and head; its backbone without prompts gives the query of both models.
        distiller: the student's objective.
        teacher: likewise, or None where ``distiller`` needs none.
        optim: optimizer and schedule, made anew for each model at each task.
        aux_loss_scale: factor of prompt and feature losses.
        seed: seed of the run; CODA's growth draws from it.
        parallel: where steps run.
        accumulate: number of equal parts in which a batch passes through the step.
        compile_step: turns a step into a faster one with the same results (``torch.compile``).
    """

    def __init__(
        self,
        student: PromptedModel,
        distiller: Distiller,
        teacher: PromptedModel | None,
        optim: OptimSettings,
        *,
        aux_loss_scale: float = 1.0,
        seed: int = 1,
        parallel: Parallel | None = None,
        accumulate: int = 1,
        compile_step: Callable[[nn.Module], nn.Module] | None = None,
    ) -> None:
        self.parallel = parallel or SingleDevice(torch.device("cpu"))
        self.student = student.to(self.parallel.device)
        self.distiller = distiller.to(self.parallel.device)
        self.teacher = teacher.to(self.parallel.device) if teacher is not None else None
        self.optim = optim
        self.seed = seed
        self.accumulate = accumulate
        self.compile_step = compile_step or (lambda step: step)
        self.aux_loss_scale = aux_loss_scale

    @property
    def query_vit(self) -> PromptedViT:
        return self.student.vit

    @property
    def phases(self) -> tuple[str, ...]:
        """Phases of a task, in order."""
        return ("teacher", "student") if self.teacher is not None else ("student",)

    @property
    def models(self) -> dict[str, PromptedModel]:
        """The models by role."""
        both = {"teacher": self.teacher, "student": self.student}
        return {role: both[role] for role in self.phases}

    def begin_task(self, task: int) -> None:
        """Prepare both pools for ``task`` (CODA grows before every task; the first growth is part of building)."""
        for role, model in self.models.items():
            if task > 0:
                model.prompt.begin_task(task, generator(self.seed, "growth", role, task))

    def resume_task(self, task: int) -> None:
        """Tell the pools which task their loaded parameters belong to."""
        for model in self.models.values():
            model.prompt.task = task

    def begin_phase(self, phase: str, classes: ClassRange, class_weights: Tensor | None = None) -> Phase:
        """Step and optimizer of one phase of the current task.

        Args:
            phase: ``"teacher"`` or ``"student"``.
            classes: columns that compete in the losses.
            class_weights: weight of each class in the cross entropy [C], or None.
        """
        if class_weights is not None:
            class_weights = class_weights.to(self.parallel.device)
        options = {"aux_loss_scale": self.aux_loss_scale, "class_weights": class_weights}
        if self.teacher is not None:
            for part in (self.teacher.prompt, self.teacher.last):
                part.requires_grad_(phase == "teacher")
        if phase == "teacher":
            step: Step = TeacherStep(self.query_vit, self.teacher, **options)
        else:
            step = StudentStep(self.query_vit, self.student, self.distiller, self.teacher, **options)
        return Phase(step, classes, self.optim, self.parallel, self.accumulate, self.compile_step)

    def eval_step(self) -> EvalStep:
        """Evaluation of both models in one pass; puts them into evaluation mode."""
        return EvalStep(self.query_vit, self.student, self.distiller, self.teacher)

    def evaluator(self) -> nn.Module:
        """The evaluation step as it is to be called, on this process's images."""
        return self.parallel.wrap_evaluation(self.compile_step(self.eval_step()))

    def state(self, role: str) -> dict[str, Tensor]:
        """Trained parts of one model under the original's names; the student's include the KD method's."""
        state = self.models[role].trained_state()
        if role == "student":
            state |= self.distiller.state_dict()
        return {key: value.detach() for key, value in state.items()}

    def load_state(self, role: str, state: Mapping[str, Tensor]) -> None:
        """Load what :meth:`state` returned.

        Raises:
            RuntimeError: a name or shape does not fit.
        """
        model_keys = self.models[role].trained_state().keys()
        rest = {key: value for key, value in state.items() if key not in model_keys}
        self.models[role].load_trained_state({key: value for key, value in state.items() if key in model_keys})
        if role == "student":
            self.distiller.load_state_dict(rest)
        elif rest:
            raise RuntimeError(f"the teacher's state has unknown {sorted(rest)}")


class Phase:
    """Training of one model on one task.

    Args:
        step: losses of a batch.
        classes: columns that compete.
        optim: optimizer and schedule.
        parallel: where the step runs.
        accumulate: number of equal parts of a batch.
        compile_step: see :class:`PromptLearner`.
    """

    def __init__(
        self,
        step: Step,
        classes: ClassRange,
        optim: OptimSettings,
        parallel: Parallel,
        accumulate: int = 1,
        compile_step: Callable[[nn.Module], nn.Module] = lambda step: step,
    ) -> None:
        self.step = step.to(parallel.device)
        self.classes = classes
        self.optim = optim
        self.parallel = parallel
        self.accumulate = accumulate
        self.parameters = step.trained_parameters()
        self.optimizer = build_optimizer(self.parameters, optim)
        half = step.query_vit.autocast_dtype == torch.float16
        # Each process goes backward from the mean of its own rows, and only then are gradients averaged: with the
        # default scale they would be as many times larger as there are processes, and overflow the earlier.
        scale = 2.0**16 / parallel.world_size
        self.scaler = torch.amp.GradScaler(parallel.device.type, init_scale=scale, enabled=half)
        self.step.train()
        self.run = parallel.wrap(compile_step(self.step))

    @property
    def lr(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    def begin_epoch(self, epoch: int) -> None:
        """Set the learning rate of ``epoch``, from 0."""
        set_learning_rate(self.optimizer, learning_rate(self.optim, epoch))

    def train_step(self, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Update the model with one batch.

        Args:
            images: this process's rows of the global batch, [b, 3, H, W] in [0, 1].
            targets: their labels [b].

        Returns:
            ``loss``, its terms, ``correct`` and ``gradient`` (norm before the update), on the device, for this
            process's rows.

        Raises:
            ValueError: the rows cannot be cut into ``accumulate`` equal parts, whose means would not be the batch's.
        """
        if len(images) % self.accumulate:
            raise ValueError(f"{len(images)} images cannot be cut into {self.accumulate} equal parts")
        self.optimizer.zero_grad(set_to_none=True)
        parts = []
        chunks = list(zip(images.chunk(self.accumulate), targets.chunk(self.accumulate), strict=True))
        for index, (some_images, some_targets) in enumerate(chunks):
            with self.parallel.synchronize(self.run, last=index == len(chunks) - 1):
                result = self.run(some_images, some_targets, self.classes)
                loss = result[LOSS].mean() / len(chunks)
                self.scaler.scale(loss).backward()
            parts.append({name: _over_replicas(name, value.detach()) for name, value in result.items()})
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return _over_chunks(parts) | {GRADIENT: norm}

    def state(self) -> dict:
        """Optimizer (and loss scale) as they stand, for a resume."""
        return {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}

    def load_state(self, state: Mapping) -> None:
        """Load what :meth:`state` returned."""
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])


def is_count(name: str) -> bool:
    """Whether a result of a step is a count, to be summed, rather than a loss, to be averaged."""
    return name == "correct"


def _over_replicas(name: str, value: Tensor) -> Tensor:
    return value.sum() if is_count(name) else value.mean()


def _over_chunks(parts: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    parts = list(parts)
    if len(parts) == 1:
        return parts[0]
    stacked = {name: torch.stack([part[name].float() for part in parts]) for name in parts[0]}
    return {name: _over_replicas(name, value) for name, value in stacked.items()}
