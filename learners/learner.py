"""Teacher, student and KD method of a run, and the training of one of the two models on one task."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dataloaders.tasks import ClassRange
from learners.distillers.base import Distiller
from learners.optim import build_optimizer, learning_rate
from learners.steps import EvalStep, Step, StepResult, StudentStep, TeacherStep
from models.prompted_model import PromptedModel
from utils.config import Config
from utils.parallel import Parallel
from utils.seed import generator


class TeacherStudentLearner:
    """Continual distillation of a teacher into a student, one task after the other (arXiv 2407.13911).

    It knows roles and steps, but neither data sets nor files, and no prompt pool or KD method by name.

    Args:
        config: settings of the run; its optimizer and schedule start again for each model at each task.
        student: frozen backbone, pool and head; its backbone without prompts gives the query of both models.
        distiller: the student's objective.
        teacher: like the student, or None where ``distiller`` needs none.
    """

    def __init__(
        self,
        config: Config,
        student: PromptedModel,
        distiller: Distiller,
        teacher: PromptedModel | None,
        parallel: Parallel,
    ) -> None:
        self.config = config
        self.parallel = parallel
        self.student = student.to(parallel.device)
        self.query_vit = self.student.vit
        self.distiller = distiller.to(parallel.device)
        self.teacher = teacher.to(parallel.device) if teacher is not None else None
        # By role, in the order in which they learn a task.
        self.models = ({"teacher": self.teacher} if self.teacher is not None else {}) | {"student": self.student}
        self.roles = tuple(self.models)

    def begin_task(self, task: int) -> None:
        """Prepare both pools for ``task`` (CODA grows before every task; the first growth is part of building)."""
        if task > 0:
            for role, model in self.models.items():
                model.prompt.begin_task(task, generator(self.config.seed, "growth", role, task))

    @torch.no_grad()
    def end_task(self, task: int) -> None:
        """Conclude ``task`` in both pools, once both models have learned it."""
        for model in self.models.values():
            model.prompt.end_task(task)

    def resume_task(self, task: int) -> None:
        """Tell the pools which task their loaded parameters belong to."""
        for model in self.models.values():
            model.prompt.task = task

    def begin_training(self, role: str, classes: ClassRange, class_weights: Tensor | None = None) -> "TaskTraining":
        """Step and optimizer that train one model on the current task; the arguments are those of the steps."""
        if self.teacher is not None:
            for part in (self.teacher.prompt, self.teacher.last):
                part.requires_grad_(role == "teacher")
        options = {"aux_loss_scale": self.config.aux_loss_scale, "class_weights": class_weights}
        if role == "teacher":
            step: Step = TeacherStep(self.query_vit, self.teacher, **options)
        else:
            step = StudentStep(self.student, self.distiller, self.teacher, **options)
        return TaskTraining(step, classes, self.config, self.parallel)

    def eval_step(self) -> EvalStep:
        """Evaluation of both models in one pass; puts them into evaluation mode."""
        return EvalStep(self.student, self.distiller, self.teacher)

    def evaluator(self) -> nn.Module:
        """The evaluation step as it is to be called, on this process's images."""
        return self.parallel.wrap_evaluation(self.eval_step())

    def state(self, role: str) -> dict[str, Tensor]:
        """Trained parts of one model under the original's names; the student's include the KD method's."""
        state = self.models[role].trained_state()
        if role == "student":
            state |= self.distiller.state_dict()
        return {key: value.detach() for key, value in state.items()}

    def load_state(self, role: str, state: Mapping[str, Tensor]) -> None:
        """Load the result of :meth:`state`; RuntimeError if a name or shape does not fit."""
        if role == "student":
            own = self.student.trained_state().keys()
            self.distiller.load_state_dict({key: value for key, value in state.items() if key not in own})
            state = {key: value for key, value in state.items() if key in own}
        self.models[role].load_trained_state(state)

    def take_teacher(self, state: Mapping[str, Tensor]) -> None:
        """Load the parameters of a teacher that another run has taught the current task.

        Its buffers are of the end of the task, which is still to come here.
        """
        own = self.state("teacher")
        buffers = own.keys() - dict(self.teacher.named_parameters()).keys()
        self.load_state("teacher", {**state, **{key: own[key] for key in buffers}})

    def parameter_counts(self) -> dict[str, dict[str, int] | None]:
        """Numbers of parameters per role, in all and trained (the student's with the KD method's)."""
        counts: dict[str, dict[str, int] | None] = {"teacher": None}
        for role, model in self.models.items():
            frozen = sum(p.numel() for p in model.vit.parameters())
            total = sum(p.numel() for p in model.parameters())
            total += sum(p.numel() for p in self.distiller.parameters()) if role == "student" else 0
            counts[role] = {"total": total, "trained": total - frozen}
        return counts


class TaskTraining:
    """Training of one model on one task; ``classes`` are the columns that compete in the losses of ``step``."""

    def __init__(self, step: Step, classes: ClassRange, config: Config, parallel: Parallel) -> None:
        self.step = step.to(parallel.device).train()
        self.classes = classes
        self.config = config
        self.parallel = parallel
        self.progress, self.lr = 0.0, config.optim.lr  # share of the epochs that are done, learning rate
        self.parameters = [p for p in step.parameters() if p.requires_grad]
        self.optimizer = build_optimizer(self.parameters, config.optim)
        half = step.query_vit.autocast_dtype == torch.float16
        # Each process goes backward from the mean of its own rows, and only then are gradients averaged: with the
        # default scale they would be as many times larger as there are processes, and overflow earlier.
        scale = 2.0**16 / parallel.world_size
        self.scaler = torch.amp.GradScaler(parallel.device.type, init_scale=scale, enabled=half)
        self.run = parallel.wrap(self.step)

    def begin_epoch(self, epoch: int) -> None:
        """Set the learning rate of ``epoch``, from 0."""
        self.progress = epoch / self.config.optim.epochs
        self.lr = learning_rate(self.config.optim, epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr

    def train_step(self, images: Tensor, targets: Tensor) -> StepResult:
        """Update the model with one batch; what it returns are scalars on the device.

        Args:
            images: this process's rows of the global batch, [b, 3, H, W] in [0, 1]; b divides by ``accumulate``.
            targets: their labels [b].
        """
        self.optimizer.zero_grad(set_to_none=True)
        number = self.config.accumulate
        results = []
        for part in zip(images.chunk(number), targets.chunk(number), strict=True):
            with self.parallel.synchronize(self.run, last=len(results) == number - 1):
                result = self.run(*part, self.classes, self.progress)
                self.scaler.scale(result.loss.mean() / number).backward()
            results.append(result._replace(loss=result.loss.detach()))
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        self.scaler.step(self.optimizer)
        self.scaler.update()
        # Losses are averaged and counts summed over the parts of the batch and the replicas of the step.
        loss, correct = (torch.cat([getattr(result, name) for result in results]) for name in ("loss", "correct"))
        terms = {name: torch.cat([result.terms[name] for result in results]).mean() for name in results[0].terms}
        return StepResult(loss.mean(), terms, correct.sum(), norm)

    def state(self) -> dict:
        """Optimizer (and loss scale) for a resume."""
        return {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}

    def load_state(self, state: Mapping) -> None:
        """Load the result of :meth:`state`."""
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
