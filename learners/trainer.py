"""The task loop: learn each task's phases, evaluate, save; and go on wherever a run was interrupted."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from dataloaders.loader import DataPipeline
from dataloaders.tasks import ClassRange, TaskStream
from learners.meter import LossMeter, NonFiniteError
from learners.prompt import Phase, PromptLearner
from learners.record import RunRecord
from learners.signals import Signals, StoppedError
from utils.checkpoint import RunFolder, from_bytes, to_bytes
from utils.logging import Progress
from utils.parallel import Parallel

_log = logging.getLogger(__name__)

# Epochs of a small data set may take less time than saving: a state is saved after an epoch unless that would
# raise the share of time spent on saving above this. What is not saved is computed again, bit for bit.
SAVING_SHARE = 0.02


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
        identity: what must be equal for a state to be resumed (checksums of the backbones).
        on_epoch: called with phase name, task, epoch and means after each epoch (TensorBoard).
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
        identity: Mapping[str, str] | None = None,
        on_epoch: Callable[[str, int, int, Mapping[str, float]], None] = lambda *_: None,
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
        self.identity = dict(identity or {})
        self.on_epoch = on_epoch
        self.record = RunRecord()
        self._saved_at = time.monotonic()
        self._save_seconds = 0.0

    def run(self) -> RunRecord:
        """Learn what is left of the run.

        Raises:
            StoppedError: a signal asked to stop; the state is saved.
            NonFiniteError: a loss or gradient is not finite; the last good state stays.
        """
        state = self._restore()
        position = Position(**state["position"]) if state else Position()
        while position.task < self.num_tasks:
            if position.starts_task:
                self.learner.begin_task(position.task)
            self._run_task(position, state)
            position, state = Position(position.task + 1), None
        return self.record

    def _restore(self) -> dict[str, Any] | None:
        """Load the newest state, where there is one."""
        data = self.folder.newest_state() if self.folder is not None else None
        data = self.parallel.broadcast(data)
        if data is None:
            return None
        state = from_bytes(data)
        if state["identity"] != self.identity:
            raise ValueError(
                "the backbones' weights differ from those that this run started with "
                f"({state['identity']} then, {self.identity} now): use the same files, or --overwrite 1"
            )
        self.record = RunRecord.from_state(state["record"])
        position = Position(**state["position"])
        self.learner.resume_task(max(0, position.task - position.starts_task))
        for role, tensors in state["models"].items():
            self.learner.load_state(role, tensors)
        _log.info("Resuming at task %d, phase %d, epoch %d, step %d", position.task + 1, position.phase + 1,
                  position.epoch + 1, position.step + 1)  # fmt: skip
        return state

    def _run_task(self, position: Position, state: dict[str, Any] | None) -> None:
        task, phases = position.task, self.learner.phases
        for index in range(position.phase, len(phases)):
            here = index == position.phase
            start = position if here else Position(task, index)
            self._run_phase(start, phases[index], state if here and (start.epoch or start.step) else None)
        self._evaluate(task)

    def _run_phase(self, start: Position, name: str, state: dict[str, Any] | None) -> None:
        """Train one model from ``start`` (with the optimizer of ``state``) to its last epoch."""
        task = start.task
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
            here = Position(task, start.phase, epoch, first)
            started, images = time.monotonic(), meter.images
            try:
                self._run_epoch(phase, name, here, meter)
            except NonFiniteError as error:
                raise NonFiniteError(
                    f"task {task + 1}, {name}, epoch {epoch + 1}, {error}: lower --lr, or use --precision fp32; "
                    "the last good state is kept"
                ) from None
            self.record.add_epoch(name, task, epoch, meter.means())
            self.record.add_time(task, name, 1, time.monotonic() - started, meter.images - images)
            self.on_epoch(name, task, epoch, meter.means())
            last = epoch == self.epochs - 1
            following = Position(task, start.phase + 1) if last else Position(task, start.phase, epoch + 1)
            self._after_epoch(following, None if last else phase)
        self.progress.end_phase()

    def _run_epoch(self, phase: Phase, name: str, here: Position, meter: LossMeter) -> None:
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

    def _obey(self, position: Position, phase: Phase | None, meter: LossMeter | None) -> None:
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
            raise StoppedError(stop or 15)

    def _after_epoch(self, position: Position, phase: Phase | None) -> None:
        since = time.monotonic() - self._saved_at
        due = self._save_seconds <= SAVING_SHARE * since
        if self.parallel.broadcast(due) if self.parallel.world_size > 1 else due:
            self._save(position, phase, None)
        self._obey(position, phase, None)

    def _save(
        self,
        position: Position,
        phase: Phase | None,
        meter: LossMeter | None,
        files: Mapping[str, bytes] | None = None,
    ) -> None:
        if self.folder is None:
            return
        started = time.monotonic()
        state = {
            "position": asdict(position),
            "identity": self.identity,
            "models": {role: _on_cpu(self.learner.state(role)) for role in self.learner.phases},
            "phase": _on_cpu(phase.state()) if phase is not None else None,
            "meter": meter.state() if meter is not None else None,
            "record": self.record.state(),
        }
        self.folder.commit_state(to_bytes(state), files)
        self._saved_at = time.monotonic()
        self._save_seconds = self._saved_at - started

    def _competing(self, task: int) -> ClassRange:
        """Columns that compete in the losses: the task's classes, with replay all classes seen."""
        classes = self.stream.classes(task)
        return ClassRange(0, classes.stop) if self.replay else classes

    def _evaluate(self, task: int) -> None:
        """Measure both models on all tasks seen; write results, models and state as one commit."""
        started = time.monotonic()
        rows, usage = evaluate(self.learner, self.stream, self.data, self.parallel, task)
        self.record.evaluation[task:] = [{"task": task, "seconds": time.monotonic() - started}]
        for role, row in rows.items():
            matrix = self.record.accuracy.setdefault(role, [])
            matrix[task:] = [row]
            self.record.usage.setdefault(role, [])[task:] = [usage[role]]
            _log.info("After task %d/%d the %s's accuracy is %.2f %%", task + 1, self.num_tasks, role,
                      sum(row) / len(row))  # fmt: skip
        if self.folder is None:
            return
        files = self.result_files(self.record) | model_files(self.learner, task)
        self._save(Position(task + 1), None, None, files)
        self._obey(Position(task + 1), None, None)


def evaluate(
    learner: PromptLearner, stream: TaskStream, data: DataPipeline, parallel: Parallel, task: int
) -> tuple[dict[str, list[float]], dict[str, dict[str, list[float]]]]:
    """Accuracies after ``task``.

    Returns:
        For each role the accuracy (%) on tasks 0 … ``task``, top 1 over all classes seen; and for each role
        the mean use of the pool's entries by the newest task's test images, by layer.
    """
    step = learner.evaluator()
    seen = stream.classes(task).stop
    rows: dict[str, list[float]] = {role: [] for role in learner.phases}
    for past in range(task + 1):
        correct = torch.zeros(len(rows), dtype=torch.int64, device=parallel.device)
        for images, targets in data.test(past):
            result = step(images, targets, seen)
            correct += torch.stack([result[role].sum() for role in rows])
        counts = parallel.sum(correct).tolist()
        for role, count in zip(rows, counts, strict=True):
            rows[role].append(100 * count / stream.test_size(past))
    return rows, _usage(learner, data, parallel, task, stream.test_size(task))


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
    return {model_file(role, task): to_bytes(_on_cpu(learner.state(role))) for role in learner.phases}


def _on_cpu(value: Any) -> Any:
    """A copy of nested containers with every tensor on the CPU, with a storage of its own."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True).contiguous()
    if isinstance(value, Mapping):
        return {key: _on_cpu(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_on_cpu(item) for item in value]
    return value
