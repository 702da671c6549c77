"""The task loop: learn each task's phases, evaluate, save; and go on wherever a run was interrupted."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dataloaders.loader import DataPipeline
from dataloaders.tasks import ClassRange, TaskStream
from learners.meter import LossMeter, NonFiniteError, TrainingError
from learners.prompt import Phase, PromptLearner
from learners.record import RunRecord
from learners.signals import Signals, StoppedError
from learners.state import Described, copy_to_cpu, describe, pack, unpack, unpack_plain
from learners.steps import NOT_FINITE
from learners.teachers import TrainedTeachers
from utils.checkpoint import RunFolder, from_bytes, to_bytes
from utils.logging import Progress
from utils.parallel import Parallel

_log = logging.getLogger(__name__)

@dataclass(frozen=True)
class Position:
    """Where a run stands: what is to be done next.

    Attributes:
        task: from 0.
        phase: index of the phase; the number of phases means that evaluation is next.
        epoch: from 0.
        step: steps of this epoch that are done.
    """

    task: int = 0
    phase: int = 0
    epoch: int = 0
    step: int = 0

    @property
    def starts_task(self) -> bool:
        """Nothing of the task was done yet, not even the growth of the pools."""
        return (self.phase, self.epoch, self.step) == (0, 0, 0)


class Trainer:
    """Teach a learner all tasks of a stream.

    A state is saved after every epoch. It holds what changed since the task began (see ``learners.state``), so a
    resume begins the task again, from the models saved after the task before it, and then takes the state over.
    While a state is being written the next epoch is already under way.

    Args:
        learner: teacher, student and their phases.
        stream: tasks.
        data: batches.
        folder: files of the run; None on processes that do not write.
        parallel: where it runs.
        epochs: per phase.
        num_tasks: tasks to learn, at most those of the stream.
        result_files: makes the files of ``Results/`` from the record after each task.
        progress: shows where the run is.
        signals: what the user asks for meanwhile.
        log_interval: steps between two readings of the losses.
        class_weighting: weigh classes in the cross entropy by their frequency.
        replay: past classes are in the batches, so all classes seen compete.
        on_epoch: called with phase name, task, epoch and means after each epoch (TensorBoard).
        teachers: trained teachers of another run, taken where it has them.
    """

    def __init__(
        self,
        learner: PromptLearner,
        stream: TaskStream,
        data: DataPipeline,
        folder: RunFolder | None,
        parallel: Parallel,
        *,
        epochs: int,
        num_tasks: int,
        result_files: Callable[[RunRecord], dict[str, bytes]],
        progress: Progress,
        signals: Signals,
        log_interval: int = 10,
        class_weighting: bool = False,
        replay: bool = False,
        on_epoch: Callable[[str, int, int, Mapping[str, float]], None] = lambda *_: None,
        teachers: TrainedTeachers | None = None,
    ) -> None:
        self.learner = learner
        self.stream = stream
        self.data = data
        self.folder = folder
        self.parallel = parallel
        self.epochs = epochs
        self.num_tasks = num_tasks
        self.result_files = result_files
        self.progress = progress
        self.signals = signals
        self.log_interval = log_interval
        self.class_weighting = class_weighting
        self.replay = replay
        self.on_epoch = on_epoch
        self.teachers = teachers
        self.record = RunRecord()
        self._task_start: dict[str, Any] = {}
        self._models: dict[str, dict[str, Tensor]] = {}
        self._saved_models: dict[str, dict[str, Tensor] | Described] = {}
        self._writer = ThreadPoolExecutor(1)
        self._written: Future[None] | None = None

    def run(self) -> RunRecord:
        """Learn what is left of the run.

        Raises:
            StoppedError: a signal asked to stop; the state is saved.
            TrainingError: a pool cannot grow.
            NonFiniteError: a loss, a gradient or a parameter is not finite; the last good state stays.
            RunFolderError: a file cannot be written; the last good state stays.
        """
        with self._writer:
            self._run()
            self._wait_until_written()
        return self.record

    def _run(self) -> None:
        saved = self._read_state()
        position = self._resume(*saved) if saved else Position()
        while position.task < self.num_tasks:
            self._begin_task(position.task)
            state = None
            if saved and not position.starts_task:
                state = unpack(saved[0], self._task_start)
                for role, tensors in state["models"].items():
                    self.learner.load_state(role, tensors)
            self._run_task(position, state)
            position, saved = Position(position.task + 1), None

    def _read_state(self) -> tuple[bytes, dict[str, bytes]] | None:
        """The newest state, and the models from which its task began; the first process reads for all."""
        saved = None
        if self.folder is not None:
            state, problems = self.folder.newest_state()
            for problem in problems:
                _log.warning("%s; going on from the state before it", problem)
            if state is not None:
                task = unpack_plain(state)["position"]["task"]
                files = self._models_before(task)
                saved = state, {role: self.folder.read(name) for role, name in files.items()}
        return self.parallel.broadcast(saved)

    def _models_before(self, task: int) -> dict[str, str]:
        """Files of the models from which a task begins; none for the first task."""
        return {role: model_file(role, task - 1) for role in self.learner.phases} if task else {}

    def _resume(self, state: bytes, models: Mapping[str, bytes]) -> Position:
        """Make the learner as it was before the state's task."""
        plain = unpack_plain(state)
        position = Position(**plain["position"])
        self.record = RunRecord.from_state(plain["record"])
        for role, data in models.items():
            self.learner.load_state(role, from_bytes(data))
        if position.task < self.num_tasks:
            _log.info("Going on at %s", self._place(position))
        return position

    def _place(self, position: Position) -> str:
        parts = [*self.learner.phases, "evaluation"]
        where = f"task {position.task + 1}, {parts[position.phase]}"
        trains = position.phase < len(self.learner.phases)
        return where + f", epoch {position.epoch + 1}, step {position.step + 1}" if trains else where

    def _begin_task(self, task: int) -> None:
        try:
            self.learner.begin_task(task)
        except ValueError as error:
            raise TrainingError(f"task {task + 1} cannot begin: {error} The last good state is kept.") from error
        self._models = {role: self.learner.state(role) for role in self.learner.phases}  # change as training goes on
        self._saved_models = self._models
        self._task_start = {"models": copy_to_cpu(self._models)}

    def _run_task(self, position: Position, state: dict[str, Any] | None) -> None:
        task, phases = position.task, self.learner.phases
        for index in range(position.phase, len(phases)):
            here = index == position.phase
            start = position if here else Position(task, index)
            if phases[index] == "teacher" and self._take_teacher(start):
                continue
            self._run_phase(start, phases[index], state if here and (start.epoch or start.step) else None)
        self._evaluate(task)

    def _take_teacher(self, start: Position) -> bool:
        """Take the teacher from the run that has it; the record becomes what training it would have made of it."""
        if self.teachers is None:
            return False
        task, following = start.task, Position(start.task, start.phase + 1)
        found = self.parallel.broadcast(self.teachers.find(task) if self.folder is not None else None)
        if found is None:
            return False
        self.learner.load_state("teacher", from_bytes(found.model))
        for epoch, means in enumerate(found.losses):
            self.record.add_epoch("teacher", task, epoch, means)
        _log.info("Task %d/%d: teacher taken from %s", task + 1, self.num_tasks, self.teachers.root)
        self._saved_models = self._models
        self._save(following)
        self._obey(following)
        return True

    def _run_phase(self, start: Position, name: str, state: dict[str, Any] | None) -> None:
        """Train one model from ``start`` (with the optimizer of ``state``) to its last epoch."""
        task = start.task
        # What the phase does not train is compared with the task's start once, not after each epoch.
        self._saved_models = {
            role: tensors if role == name else describe(tensors, self._task_start["models"][role])
            for role, tensors in self._models.items()
        }
        weights = torch.from_numpy(self.stream.class_weights(task)) if self.class_weighting else None
        phase = self.learner.begin_phase(name, self._competing(task), weights)
        if state is not None:
            phase.load_state(state["phase"])
        self.progress.start_phase(task, name, self.epochs, start.epoch)
        for epoch in range(start.epoch, self.epochs):
            meter = LossMeter(self.parallel, check_gradient=not phase.scaler.is_enabled())
            first = start.step if epoch == start.epoch else 0
            if first:
                meter.load_state(state["meter"])
            last = epoch == self.epochs - 1
            following = Position(task, start.phase + 1) if last else Position(task, start.phase, epoch + 1)
            try:
                self._run_epoch(phase, name, Position(task, start.phase, epoch, first), meter)
                self._save(following, None if last else phase)
            except NonFiniteError as error:
                raise NonFiniteError(
                    f"task {task + 1}, {name}, epoch {epoch + 1}, {error}: lower --lr, or use --precision fp32; "
                    "the last good state is kept"
                ) from None
            self._obey(following, None if last else phase)
        self.progress.end_phase()

    def _run_epoch(self, phase: Phase, name: str, here: Position, meter: LossMeter) -> None:
        started, images_before = time.monotonic(), meter.images
        steps = self.data.steps_per_epoch(here.task)
        phase.begin_epoch(here.epoch)
        self.progress.start_epoch(here.epoch, steps)
        batches = self.data.train(here.task, name, here.epoch, first_step=here.step)
        for step, (images, targets) in enumerate(batches, here.step + 1):
            result = phase.train_step(images, targets)
            count = len(images) * self.parallel.world_size
            meter.add(result, count)
            self.progress.step(count)
            read = step % self.log_interval == 0 or step == steps
            if read:
                meter.read()
                means = meter.means()
                self.progress.update(means["loss"], means["accuracy"])
            # Several processes must agree on when to stop, which they do where they exchange losses anyway.
            if step < steps and (read or self.parallel.world_size == 1):
                self._obey(Position(here.task, here.phase, here.epoch, step), phase, meter)
        self.progress.end_epoch()
        means = meter.means()
        self.record.add_epoch(name, here.task, here.epoch, means)
        self.record.add_time(here.task, name, 1, time.monotonic() - started, meter.images - images_before)
        self.on_epoch(name, here.task, here.epoch, means)

    def _obey(self, position: Position, phase: Phase | None = None, meter: LossMeter | None = None) -> None:
        """Save when a signal asks for it, and stop when one asks for that."""
        stop = self.signals.stop
        asked = torch.tensor([stop, int(self.signals.save)])
        if self.parallel.world_size > 1:
            asked = self.parallel.sum((asked > 0).int().to(self.parallel.device)).cpu()
        if not asked.any():
            return
        if meter is not None:
            meter.read()
        self._save(position, phase, meter)
        self.signals.save = False
        if asked[0]:
            self._wait_until_written()
            raise StoppedError(stop or 15)

    def _save(
        self,
        position: Position,
        phase: Phase | None = None,
        meter: LossMeter | None = None,
        files: Mapping[str, bytes] | None = None,
    ) -> None:
        """Commit what is to be done next and all that it takes, and ``files`` with it."""
        state = {
            "position": asdict(position),
            "record": self.record.state(),
            "meter": meter.state() if meter is not None else None,
            "phase": phase.state() if phase is not None else None,
            "models": {} if position.starts_task else self._saved_models,
        }
        try:
            data = pack(state, self._task_start)
        except ValueError as error:
            raise NonFiniteError(f"after the last step: {error}") from error
        if self.folder is not None:
            self._wait_until_written()
            needs = self._models_before(position.task).values()
            self._written = self._writer.submit(self.folder.commit_state, data, needs, files)

    def _wait_until_written(self) -> None:
        """Wait for the last save.

        Raises:
            RunFolderError: it failed.
        """
        if self._written is not None:
            self._written.result()
            self._written = None

    def _competing(self, task: int) -> ClassRange:
        """Columns that compete in the losses: the task's classes, with replay all classes seen."""
        classes = self.stream.classes(task)
        return ClassRange(0, classes.stop) if self.replay else classes

    def _evaluate(self, task: int) -> None:
        """Measure both models on all tasks seen; write results, models and state as one commit."""
        started = time.monotonic()
        here = Position(task, len(self.learner.phases))
        rows, usage = evaluate(
            self.learner, self.stream, self.data, self.parallel, task, between=lambda: self._obey(here)
        )
        self.record.evaluation[task:] = [{"task": task, "seconds": time.monotonic() - started}]
        for role, row in rows.items():
            matrix = self.record.accuracy.setdefault(role, [])
            matrix[task:] = [row]
            self.record.usage.setdefault(role, [])[task:] = [usage[role]]
            _log.info("After task %d/%d the %s's accuracy is %.2f %%", task + 1, self.num_tasks, role,
                      sum(row) / len(row))  # fmt: skip
        following = Position(task + 1)
        files = self.result_files(self.record) | model_files(self.learner, task) if self.folder is not None else {}
        self._save(following, files=files)
        self._obey(following)


def evaluate(
    learner: PromptLearner,
    stream: TaskStream,
    data: DataPipeline,
    parallel: Parallel,
    task: int,
    between: Callable[[], None] = lambda: None,
) -> tuple[dict[str, list[float]], dict[str, dict[str, list[float]]]]:
    """Accuracies after ``task``.

    Args:
        between: called now and then, by all processes equally often.

    Returns:
        For each role the accuracy (%) on tasks 0 … ``task``, top 1 over all classes seen; and for each role
        the mean use of the pool's entries by the newest task's test images, by layer.

    Raises:
        NonFiniteError: a logit is infinite or not a number.
    """
    step = learner.evaluator()
    seen = stream.classes(task).stop
    rows: dict[str, list[float]] = {role: [] for role in learner.phases}
    for past in range(task + 1):
        totals = torch.zeros(len(rows) + 1, dtype=torch.int64, device=parallel.device)
        for images, targets in data.test(past):
            totals += _counts(step, images, targets, seen, [*rows, NOT_FINITE])
            if parallel.world_size == 1:
                between()
        if parallel.world_size > 1:
            between()
        *counts, not_finite = parallel.sum(totals).tolist()
        if not_finite:
            raise NonFiniteError(
                f"after task {task + 1}, logits of task {past + 1}'s test images are not finite ({not_finite} of "
                "them): start anew with --precision fp32 or bf16, or a lower --lr"
            )
        for role, count in zip(rows, counts, strict=True):
            rows[role].append(100 * count / stream.test_size(past))
    return rows, _usage(learner, data, parallel, task, stream.test_size(task))


@torch.inference_mode()
def _counts(step: nn.Module, images: Tensor, targets: Tensor, seen: int, names: Iterable[str]) -> Tensor:
    """What the step counts in a batch, by name; on several replicas it counts for each."""
    result = step(images, targets, seen)
    return torch.stack([result[name].sum() for name in names])


@torch.no_grad()
def _usage(
    learner: PromptLearner, data: DataPipeline, parallel: Parallel, task: int, images: int
) -> dict[str, dict[str, list[float]]]:
    vit = learner.query_vit
    queries = [vit(vit.embed(batch)).cls.float() for batch, _ in data.test(task)]
    query = torch.cat(queries) if queries else torch.zeros(0, vit.embed_dim, device=parallel.device)
    return {
        role: {
            layer: (parallel.sum(total).cpu().double() / images).tolist()
            for layer, total in model.prompt.usage(query).items()
        }
        for role, model in learner.models.items()
    }


def model_file(role: str, task: int) -> str:
    """Where the trained parts of a model after ``task`` are, under the original's names."""
    return f"models/task-{task + 1}/{role[0].upper()}_class.pth"


def model_files(learner: PromptLearner, task: int) -> dict[str, bytes]:
    """The trained parts after ``task``."""
    return {model_file(role, task): to_bytes(copy_to_cpu(learner.state(role))) for role in learner.phases}
