"""The task loop: train each task's models, evaluate, save; and resume wherever a run was interrupted."""

import copy
import itertools
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dataloaders.loader import Batch
from learners.build import REDUCED, Run
from learners.evaluate import evaluate
from learners.learner import TaskTraining
from learners.meter import LossMeter, NonFiniteError, TrainingError
from learners.results import History, model_file, write_results
from learners.signals import Signals, StoppedError
from learners.speed import flop_per_image, product_rate
from learners.teacher_cache import TeacherCache
from utils.checkpoint import RunFolder, to_bytes
from utils.config import Config
from utils.logging import Progress
from utils.metrics import measure

EVALUATION = "evaluation"

_log = logging.getLogger(__name__)


class Position(NamedTuple):
    """The next thing to do in a run; task, epoch and step count from 0."""

    task: int
    role: str  # "teacher", "student" or EVALUATION
    epoch: int = 0
    step: int = 0


@dataclass
class Trainer:
    """Teach a learner all tasks of a stream; a state is saved after every epoch.

    ``folder``, and ``teachers`` of ``--teacher_from``, are None on processes that do not write; ``track`` gets the
    means of each epoch and the measures after each task (see :func:`utils.logging.open_trackers`).
    """

    config: Config
    run: Run
    folder: RunFolder | None
    signals: Signals
    progress: Progress
    track: Callable[[str, int, Mapping[str, float]], None]
    teachers: TeacherCache | None

    def __post_init__(self) -> None:
        self.learner, self.data, self.parallel = self.run.learner, self.run.data, self.run.parallel
        self.history = History()
        self.roles = (*self.learner.roles, EVALUATION)
        self._writer = ThreadPoolExecutor(1)
        self._written: Future[None] | None = None

    def learn(self, state: Mapping[str, Any] | None) -> None:
        """Learn what is left of the run after ``state``.

        Raises StoppedError where a signal asks to stop, TrainingError, RunFolderError or BadImageError where training
        cannot continue; the last good state stays.
        """
        with self._writer:
            position = self._restore(state) if state is not None else Position(0, self.roles[0])
            while position.task < self.run.num_tasks:
                if position == Position(position.task, self.roles[0]):
                    try:
                        self.learner.begin_task(position.task)
                    except ValueError as error:
                        reason = f"task {position.task + 1} cannot begin: {error} The last good state is kept."
                        raise TrainingError(reason) from error
                if position.role == EVALUATION:
                    position = self._evaluate(position)
                elif position.role == "teacher" and position[2:] == (0, 0) and self._take_teacher(position.task):
                    position = self._save(self._after(position))
                else:
                    position = self._train(position, state)
                state = None
            self._wait_until_written()

    def _after(self, position: Position) -> Position:
        """The position after the last epoch of a role, or after an evaluation."""
        if position.role == EVALUATION:
            return Position(position.task + 1, self.roles[0])
        return Position(position.task, self.roles[self.roles.index(position.role) + 1])

    def _restore(self, state: Mapping[str, Any]) -> Position:
        """Make learner and history as they were when ``state`` was saved."""
        position = Position(*state["position"])
        self.history = History(**state["history"])
        self.learner.resume_task(position.task)
        for role, tensors in state["models"].items():
            self.learner.load_state(role, tensors)
        threads = torch.get_num_threads()
        before = state.get("threads", threads)
        if threads != before and self.parallel.is_main:
            _log.warning(f"{threads} threads instead of {before}: on a CPU this changes the last digits of the results")
        if position.task < self.run.num_tasks:
            place = f", epoch {position.epoch + 1}, step {position.step + 1}" if position.role != EVALUATION else ""
            _log.info("Resuming at task %d, %s%s", position.task + 1, position.role, place)
        return position

    def _take_teacher(self, task: int) -> bool:
        """Take the teacher, and the losses of its epochs, from the run of ``--teacher_from``, if it has them."""
        found = self.parallel.broadcast(self.teachers.find(task) if self.teachers is not None else None)
        if found is None:
            return False
        model, losses = found
        self.learner.take_teacher(model)
        for epoch, means in enumerate(losses):
            self.history.add_epoch("teacher", task, epoch, means)
        _log.info("Task %d/%d: teacher taken from %s", task + 1, self.run.num_tasks, self.config.teacher_from)
        return True

    def _train(self, start: Position, state: Mapping[str, Any] | None) -> Position:
        """Train one model from ``start`` (with the optimizer of ``state``) to its last epoch."""
        task, role, epochs = start.task, start.role, self.config.optim.epochs
        stream, data = self.run.stream, self.config.data
        classes = stream.classes(task)
        if data.memory > 0:
            classes = classes._replace(start=0)  # with replay, all classes seen compete in the losses
        weights = torch.from_numpy(stream.class_weights(task)) if data.class_weighting and data.memory > 0 else None
        training = self.learner.begin_training(role, classes, weights)
        if state is not None and state["training"] is not None:
            training.load_state(state["training"])
        self._count(role, training)
        self.progress.start_training(task, role, epochs, start.epoch)
        batches = self.data.train(task, role, start.epoch, until=epochs, first_step=start.step)
        here = start
        while here.role == role:
            meter = LossMeter(self.parallel, check_gradient=not training.scaler.is_enabled())
            if state is not None and here == start:
                meter.load_state(state["meter"] or {})
            last = here.epoch + 1 == epochs
            following = self._after(here) if last else here._replace(epoch=here.epoch + 1, step=0)
            try:
                self._train_epoch(training, here, meter, batches)
                if following.role == EVALUATION:
                    self.learner.end_task(task)  # before the state is saved, so that no resume does it twice
                here = self._save(following, None if last else training)
            except NonFiniteError as error:
                raise NonFiniteError(
                    f"task {task + 1}, {role}, epoch {here.epoch + 1}, {error}: lower --lr, or use --precision fp32; "
                    "the last good state is kept"
                ) from None
        self.progress.end_training()
        return here

    def _train_epoch(self, training: TaskTraining, here: Position, meter: LossMeter, batches: Iterator[Batch]) -> None:
        started, waited, images_before = time.monotonic(), self.data.waited, meter.images
        steps = self.data.steps_per_epoch(here.task)
        training.begin_epoch(here.epoch)
        self.progress.start_epoch(here.epoch, steps, training.lr)
        for step, (images, targets) in enumerate(itertools.islice(batches, steps - here.step), here.step + 1):
            result = training.train_step(images, targets)
            count = len(images) * self.parallel.world_size
            meter.add(result, count)
            self.progress.step(count)
            read = step % self.config.log_interval == 0 or step == steps
            if read:
                meter.read()
                means = meter.means()
                self.progress.update(means["loss"], means["accuracy"])
            # Several processes must agree on when to stop, which they do where they exchange losses anyway.
            if step < steps and (read or self.parallel.world_size == 1):
                self._obey_signals(here._replace(step=step), training, meter)
        self.progress.end_epoch()
        means = meter.means()
        self.history.add_epoch(here.role, here.task, here.epoch, means)
        seconds, images = time.monotonic() - started, meter.images - images_before
        self.history.add_time(here.task, here.role, seconds, self.data.waited - waited, images)
        epoch = here.task * self.config.optim.epochs + here.epoch + 1
        self.track("epoch", epoch, {f"{here.role}/{name}": value for name, value in means.items()})

    def _evaluate(self, here: Position) -> Position:
        """Measure both models on all tasks seen; write models and results, then the state that follows."""
        self._count(EVALUATION)
        started, waited = time.monotonic(), self.data.waited
        rows, usage = evaluate(self.run, here.task, between=lambda: self._obey_signals(here))
        seconds, images = time.monotonic() - started, sum(map(self.run.stream.test_size, range(here.task + 1)))
        self.history.add_evaluation(here.task, rows, usage)
        self.history.add_time(here.task, EVALUATION, seconds, self.data.waited - waited, images)
        for role, row in rows.items():
            measured = measure(self.history.accuracy[role])
            mean = measured["final_average_accuracy"]
            _log.info("After task %d/%d the %s's accuracy is %.2f %%", here.task + 1, self.run.num_tasks, role, mean)
            numbers = {f"{role}/average accuracy": mean, f"{role}/forgetting": measured["forgetting"]}
            numbers |= {f"{role}, accuracy by task/{past}": value for past, value in enumerate(row, 1)}
            self.track("task", here.task + 1, numbers)
        if self.folder is not None:
            for role, tensors in self._models().items():
                self.folder.write(model_file(role, here.task), to_bytes(tensors))
            write_results(self.folder, self.config, self.run, self.history)
        return self._save(self._after(here))

    def _count(self, phase: str, training: TaskTraining | None = None) -> None:
        """Count the arithmetic of a phase, and measure the rate of a large product, once in a run."""
        speed = self.history.speed
        if self.folder is not None and phase not in speed:
            speed[phase] = flop_per_image(self.learner, training)
        if self.folder is not None and "product" not in speed:
            devices = self.parallel.world_size if self.parallel.world_size > 1 else len(self.config.gpuid or (0,))
            dtype = REDUCED.get(self.config.precision, torch.float32)
            speed["product"] = devices * product_rate(self.parallel.device, dtype)

    def _models(self) -> dict[str, dict[str, Tensor]]:
        """Trained parts by role, copied to the CPU; each has its own storage, on which the bytes of a file depend."""
        return {
            role: {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in self.learner.state(role).items()}
            for role in self.learner.roles
        }

    def _obey_signals(self, position: Position, training: TaskTraining | None = None, meter: LossMeter | None = None):
        """Save if a signal asks for it, and stop if one asks for that."""
        asked = torch.tensor([self.signals.stop > 0, self.signals.save], dtype=torch.int32)
        if self.parallel.world_size > 1:
            asked = self.parallel.sum(asked.to(self.parallel.device)).cpu()
        if not asked.any():
            return
        if meter is not None:
            meter.read()
        self.signals.save = False
        self._write_state(position, training, meter)
        if asked[0]:
            self._wait_until_written()
            raise StoppedError(self.signals.stop or 15)

    def _save(self, position: Position, training: TaskTraining | None = None) -> Position:
        """Save the state that ``position`` follows, obey signals, and return ``position``."""
        self._write_state(position, training)
        self._obey_signals(position, training)
        return position

    def _write_state(self, position: Position, training: TaskTraining | None, meter: LossMeter | None = None) -> None:
        """Write a state in the background, while the next steps run."""
        models = self._models()
        for role, tensors in models.items():
            for name, tensor in tensors.items():
                if not tensor.isfinite().all():
                    raise NonFiniteError(f"after the last step: {role} {name} is not finite")
        if self.folder is None:
            return
        state = {
            "position": list(position),
            "threads": torch.get_num_threads(),
            "history": asdict(self.history),
            "models": models,
            "training": training and copy.deepcopy(training.state()),  # the next step changes it
            "meter": meter and meter.state(),
        }
        self._wait_until_written()
        self._written = self._writer.submit(lambda: self.folder.save_state(to_bytes(state)))

    def _wait_until_written(self) -> None:
        """Wait for the last save; a RunFolderError that ended it is raised here."""
        if self._written is not None:
            self._written.result()
