"""Batches for training and evaluation.

One set of worker processes serves all tasks, phases and epochs: the workers hold both image stores, and what
a batch consists of (indices and the seeds of its augmentation) comes with the request for it. The
augmentation of an image therefore depends only on (seed, task, phase, epoch, sample), not on who computes it.
"""

from __future__ import annotations

import math
import os
import signal
import threading
import weakref
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from dataloaders.base import BadImageError, DataError, ImageStore
from dataloaders.tasks import TaskStream
from dataloaders.transforms import to_planes, to_unit
from utils.seed import derive_seed, generator

Batch = tuple[torch.Tensor, torch.Tensor]


class BatchRequest(NamedTuple):
    """What a worker needs to know to make a batch.

    Attributes:
        train: from the training images (else from the test images).
        indices: int64 [b], into the store.
        seeds: one for each image's augmentation; None for the test transform.
    """

    train: bool
    indices: np.ndarray
    seeds: list[int] | None


class StreamImages(Dataset):
    """All images of a stream; its items are whole batches, asked for with a :class:`BatchRequest`."""

    def __init__(self, stream: TaskStream) -> None:
        self._train, self._test = stream.train_images, stream.test_images
        self._train_transform, self._test_transform = stream.train_transform, stream.test_transform
        self._size = stream.image_size

    def __getitems__(self, request: BatchRequest) -> Batch | BadImageError:
        """uint8 [b, 3, H, W] and int64 [b], or the error that an image caused.

        An error is returned rather than raised because the loader would bury its sentence under a traceback.
        """
        images = self._train if request.train else self._test
        pixels = _new_uint8((len(request.indices), 3, self._size, self._size))
        rows = pixels.numpy()
        try:
            if request.seeds is None:
                for row, index in enumerate(request.indices):
                    to_planes(self._test_transform(images.store.open_lazily(index)), rows[row])
            else:
                self._augment(images.store, request, rows)
        except BadImageError as error:
            return error
        return pixels, torch.from_numpy(images.labels[request.indices])

    def _augment(self, store: ImageStore, request: BatchRequest, rows: np.ndarray) -> None:
        state = torch.get_rng_state()
        try:
            for row, (index, seed) in enumerate(zip(request.indices, request.seeds, strict=True)):
                torch.default_generator.manual_seed(seed)
                to_planes(self._train_transform(store.open_lazily(index)), rows[row])
        finally:
            torch.set_rng_state(state)


def _new_uint8(shape: tuple[int, ...]) -> torch.Tensor:
    """An empty tensor; in a worker in shared memory, which spares a copy on the way to the main process."""
    if get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8)
    storage = torch.UntypedStorage._new_shared(math.prod(shape), device="cpu")
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, shape)


class _Plan:
    """The batch sampler of the loader: hands out the requests of whichever pass is under way."""

    def __init__(self) -> None:
        self.requests: Iterator[BatchRequest] = iter(())

    def __iter__(self) -> Iterator[BatchRequest]:
        return self.requests


class _FloatBuffers:
    """Memory for float batches that is used again once nobody holds the batch.

    Getting 38 MB from the system costs more than filling them with a batch's pixels does.
    """

    def __init__(self, limit: int = 4) -> None:
        self._limit = limit
        self._buffers: list[np.ndarray] = []
        self._users: list[weakref.ref[np.ndarray]] = []

    def take(self, shape: tuple[int, ...]) -> torch.Tensor:
        """An uninitialised float32 tensor that nothing else alive shares memory with."""
        # A tensor, its views and whatever autograd keeps of it hold the array that it was made from.
        free = [i for i, user in enumerate(self._users) if user() is None]
        slot = next((i for i in free if self._buffers[i].shape == shape), None)
        if slot is None:
            slot = free[0] if free else len(self._buffers)
            if slot == self._limit:
                return torch.empty(shape)
            self._buffers[slot : slot + 1] = [np.empty(shape, dtype=np.float32)]
        array = self._buffers[slot].view()
        self._users[slot : slot + 1] = [weakref.ref(array)]
        return torch.from_numpy(array)


class DataPipeline:
    """Loader of a stream's images.

    Args:
        stream: the tasks.
        batch_size: training images in a global batch.
        eval_batch_size: test images in this process's batch.
        workers: worker processes; 0 loads in this one.
        pin_memory: whether batches are put into page-locked memory for a GPU.
        seed: of order and augmentation.
        rank, world_size: which of how many processes this one is; a global training batch is cut into
            equal parts, a test set into parts that differ by at most one image.
        device: where batches are converted to float and handed out. On a GPU a quarter of the bytes travels.

    Raises:
        DataError: images that the split lists are missing.
    """

    def __init__(
        self,
        stream: TaskStream,
        *,
        batch_size: int,
        eval_batch_size: int,
        workers: int = 0,
        pin_memory: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        missing = stream.missing()
        if missing:
            raise DataError(
                f"{len(missing)} of the images that the split lists are missing in dataroot, the first is "
                f"{missing[0]} (--check_data lists all)"
            )
        self._stream = stream
        self._batch_size = batch_size
        self._share = batch_size // world_size
        self._eval_batch_size = eval_batch_size
        self._seed = seed
        self._rank, self._world_size = rank, world_size
        self._device = torch.device(device)
        self._buffers = _FloatBuffers()
        self._plan = _Plan()
        self._pass = 0
        self._loader: DataLoader | None = DataLoader(
            StreamImages(stream),
            batch_sampler=self._plan,
            num_workers=workers,
            collate_fn=_as_it_is,
            pin_memory=pin_memory,
            persistent_workers=workers > 0,
            worker_init_fn=partial(_begin_worker, os.getpid()),
            generator=torch.Generator(),  # the loader draws a base seed; it must not come from the global one
        )
        self._end = weakref.finalize(self, _end_workers, self._loader)

    def steps_per_epoch(self, task: int) -> int:
        """Training steps of an epoch; the last, incomplete batch is dropped.

        Raises:
            DataError: the task has fewer images than a batch, so that nothing would be learned.
        """
        samples = self._stream.train_size(task) + len(self._stream.replay(task))
        if samples < self._batch_size:
            raise DataError(
                f"task {task} has {samples} training images, fewer than batch_size {self._batch_size}, "
                "and so would take no step: lower batch_size"
            )
        return samples // self._batch_size

    def train(self, task: int, phase: str, epoch: int, *, first_step: int = 0) -> Iterator[Batch]:
        """This process's rows of the epoch's batches.

        Args:
            phase: ``teacher`` or ``student``; with task and epoch it decides order and augmentation.
            first_step: steps of the epoch to leave out at its beginning, for a resume within it.

        Yields:
            images float32 [batch_size // world_size, 3, H, W] in [0, 1] and labels int64.

        Raises:
            BadImageError: an image is missing or damaged.
        """
        steps = self.steps_per_epoch(task)
        return self._run(self._train_requests(task, phase, epoch, range(first_step, steps)))

    def test(self, task: int) -> Iterator[Batch]:
        """This process's share of the task's test images, in batches as of :meth:`train`."""
        indices = self._stream.test_indices(task)[self._rank :: self._world_size]
        size = self._eval_batch_size
        return self._run(
            BatchRequest(False, indices[start : start + size], None) for start in range(0, len(indices), size)
        )

    def close(self) -> None:
        """End the worker processes."""
        self._end()
        self._loader = None

    def _train_requests(self, task: int, phase: str, epoch: int, steps: range) -> Iterator[BatchRequest]:
        own = self._stream.train_indices(task)
        indices = np.concatenate([own, self._stream.replay(task)])
        # A replayed image may be drawn twice in an epoch: it is known by the number of its draw instead.
        samples = [*own.tolist(), *(f"replay {draw}" for draw in range(len(indices) - len(own)))]
        shuffle = generator(self._seed, "order", task, phase, epoch)
        order = torch.randperm(len(indices), generator=shuffle).numpy()
        for step in steps:
            start = step * self._batch_size + self._rank * self._share
            rows = order[start : start + self._share]
            seeds = None
            if self._stream.augmented:
                seeds = [derive_seed(self._seed, "augment", task, phase, epoch, samples[row]) for row in rows]
            yield BatchRequest(True, indices[rows], seeds)

    def _run(self, requests: Iterator[BatchRequest]) -> Iterator[Batch]:
        if self._loader is None:
            raise RuntimeError("the data pipeline is closed")
        self._pass += 1
        current = self._pass
        self._plan.requests = requests
        items = iter(self._loader)
        while True:
            if current != self._pass:
                raise RuntimeError("a new pass over the data has begun: this one is over")
            item = next(items, None)
            if item is None:
                return
            if isinstance(item, BadImageError):
                raise item
            pixels, labels = item
            yield self._to_float(pixels), labels.to(self._device, non_blocking=True)

    def _to_float(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 [b, 3, H, W] -> float32 in [0, 1] on the device."""
        if self._device.type != "cpu":
            return to_unit(pixels.to(self._device, non_blocking=True))
        images = self._buffers.take(tuple(pixels.shape))
        np.divide(pixels.numpy(), np.float32(255), out=images.numpy())
        return images


def _end_workers(loader: DataLoader) -> None:
    iterator, loader._iterator = loader._iterator, None
    if iterator is not None:
        iterator._shutdown_workers()


def _as_it_is(batch: Batch | BadImageError) -> Batch | BadImageError:
    return batch


def _begin_worker(main: int, worker: int) -> None:
    """Leave stopping to the main process: it ends its workers itself after it has saved what it has.

    SIGTERM is taken from process ``main`` alone, since a terminal or a batch system sends it to everyone. A worker
    also ends when ``main`` is gone, which torch notices only where workers are its children from the start.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigtimedwait"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with, args=(main,), daemon=True).start()


def _end_with(main: int) -> None:
    while _lives(main):
        received = signal.sigtimedwait({signal.SIGTERM}, 1.0)
        if received is not None and received.si_pid == main:
            break
    os._exit(0)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
