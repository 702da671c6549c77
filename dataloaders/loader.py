"""Batches for training and evaluation.

One set of worker processes serves all tasks, roles and epochs: the workers hold both image stores, and what
a batch consists of (indices and the seeds of its augmentation) comes with the request for it. The
augmentation of an image therefore depends only on (seed, task, role, epoch, sample), not on who computes it.
"""

import atexit
import math
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from functools import partial
from multiprocessing.synchronize import Event
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from dataloaders.base import BadImageError, DataError
from dataloaders.tasks import TaskStream
from dataloaders.transforms import to_planes, to_unit
from utils.config import DataConfig
from utils.parallel import Parallel
from utils.seed import derive_seed, generator

EVAL_BATCH_SIZE = 128  # test images in a batch of one process
Batch = tuple[torch.Tensor, torch.Tensor]  # images [b, 3, H, W], labels int64 [b]


class BatchRequest(NamedTuple):
    """All that a worker needs to make a batch."""

    train: bool  # whether the images are training or test images
    indices: np.ndarray  # int64 [b], into the store
    seeds: list[int] | None  # for each image's augmentation; None for the test transform


class StreamDataset(Dataset):
    """All images of a stream; its items are whole batches, indexed by a :class:`BatchRequest`."""

    def __init__(self, stream: TaskStream) -> None:
        self._stream = stream

    def __getitem__(self, request: BatchRequest) -> Batch | BadImageError:
        """uint8 [b, 3, H, W] and int64 [b], or the error of an image: raised, the loader would add a traceback."""
        stream, size = self._stream, self._stream.image_size
        images = stream.train_images if request.train else stream.test_images
        transform = stream.test_transform if request.seeds is None else stream.train_transform
        pixels = np.empty((len(request.indices), 3, size, size), dtype=np.uint8)
        try:
            with torch.random.fork_rng(devices=[]):
                for row, index in enumerate(request.indices):
                    if request.seeds is not None:
                        torch.default_generator.manual_seed(request.seeds[row])
                    to_planes(transform(images.store.open(index)), pixels[row])
        except BadImageError as error:
            return error
        return torch.from_numpy(pixels), torch.from_numpy(images.labels[request.indices])


class RequestSampler(Sampler[BatchRequest]):
    """Hands out the requests of the current pass over the data."""

    requests: Iterator[BatchRequest]

    def __iter__(self) -> Iterator[BatchRequest]:
        return self.requests


def require_images(stream: TaskStream) -> None:
    """Raise DataError unless all images of the stream exist."""
    if missing := stream.missing():
        where = f"are missing in dataroot, the first is {missing[0]} (--check_data lists all)"
        raise DataError(f"{len(missing)} of the images that the split lists {where}")


class DataPipeline:
    """Loader of a stream's images.

    A global training batch is split over the processes into equal parts, a test set into parts that differ
    by at most one image. Batches are converted to float on the device, so that a quarter of the bytes travels.
    Raises DataError if images that the split lists are missing.

    Args:
        stream: the tasks.
        config: batch size and number of worker processes; with 0 workers the main process loads. By default there
            are as many as cores, at most 4, and with a GPU as many as leave this process one core, at most 16.
        seed: of order and augmentation.
        parallel: device of the batches, and which of how many processes this one is.

    Attributes:
        waited: seconds that this process has waited for batches so far.
    """

    def __init__(self, stream: TaskStream, config: DataConfig, *, seed: int, parallel: Parallel) -> None:
        require_images(stream)
        self._stream = stream
        self._batch_size = config.batch_size
        self._seed = seed
        self._device, self._rank, self._world_size = parallel.device, parallel.rank, parallel.world_size
        self.waited = 0.0
        self._sampler = RequestSampler()
        self._pass_id = 0
        self._closing = multiprocessing.Event()
        # Python ends workers that are left at its exit by SIGTERM, which they must obey then.
        atexit.register(self._closing.set)
        workers = min(os.cpu_count() or 1, 4) if config.workers is None else config.workers
        if config.workers is None and parallel.device.type == "cuda":
            cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            workers = min(max(cores - 1, 1), 16)
        self._loader = DataLoader(
            StreamDataset(stream),
            batch_size=None,  # an item is a batch
            sampler=self._sampler,
            collate_fn=None if parallel.device.type == "cuda" else _small_by_value,
            num_workers=workers,
            pin_memory=parallel.device.type == "cuda",
            persistent_workers=workers > 0,
            worker_init_fn=partial(_handle_signals, self._closing),
            generator=torch.Generator(),  # the loader draws a base seed; it must not come from the global one
        )
        self._batches: Iterator[list[torch.Tensor] | BadImageError] = iter(())

    def steps_per_epoch(self, task: int) -> int:
        """Training steps of an epoch; the last, incomplete batch is dropped. DataError if that leaves none."""
        samples = self._stream.train_size(task) + len(self._stream.replay(task))
        if samples < self._batch_size:
            raise DataError(
                f"task {task + 1} has {samples} training images, fewer than batch_size {self._batch_size}, "
                "and so would take no step: lower batch_size"
            )
        return samples // self._batch_size

    def train(
        self, task: int, role: str, epoch: int, *, until: int | None = None, first_step: int = 0
    ) -> Iterator[Batch]:
        """This process's rows of the batches of ``epoch``, and of the following epochs before ``until``.

        Workers begin an epoch while the caller is still busy with the one before.

        Args:
            role: ``teacher`` or ``student``; with task and epoch it decides order and augmentation.
            first_step: number of steps to skip at the start, for a resume within the epoch.

        Yields:
            images float32 [batch_size // world_size, 3, H, W] in [0, 1] and labels int64; a BadImageError ends it.
        """
        steps = range(self.steps_per_epoch(task))
        epochs = ((each, steps[first_step if each == epoch else 0 :]) for each in range(epoch, until or epoch + 1))
        return self._run(request for each, part in epochs for request in self._train_requests(task, role, each, part))

    def test_steps(self, task: int) -> int:
        """Number of this process's batches of the task's test images."""
        return math.ceil(len(self._test_indices(task)) / EVAL_BATCH_SIZE)

    def test(self, *tasks: int) -> Iterator[Batch]:
        """This process's share of the tasks' test images, in batches of one task like those of :meth:`train`."""
        return self._run(
            BatchRequest(False, share[start : start + EVAL_BATCH_SIZE], None)
            for share in map(self._test_indices, tasks)
            for start in range(0, len(share), EVAL_BATCH_SIZE)
        )

    def _test_indices(self, task: int) -> np.ndarray:
        return self._stream.test_indices(task)[self._rank :: self._world_size]

    def close(self) -> None:
        """End the worker processes."""
        self._closing.set()
        atexit.unregister(self._closing.set)
        # Only these two refer to torch's iterator, and it ends its workers when it goes away.
        self._loader, self._batches = None, iter(())

    def _train_requests(self, task: int, role: str, epoch: int, steps: range) -> Iterator[BatchRequest]:
        own = self._stream.train_indices(task)
        indices = np.concatenate([own, self._stream.replay(task)])
        # A replayed image may be drawn twice in an epoch: it is known by the number of its draw instead.
        samples = [*own.tolist(), *(f"replay {draw}" for draw in range(len(indices) - len(own)))]
        shuffle = generator(self._seed, "order", task, role, epoch)
        order = torch.randperm(len(indices), generator=shuffle).numpy()
        share = self._batch_size // self._world_size
        augmented = self._stream.train_transform is not self._stream.test_transform
        for step in steps:
            start = step * self._batch_size + self._rank * share
            rows = order[start : start + share]
            seeds = [derive_seed(self._seed, "augment", task, role, epoch, samples[row]) for row in rows]
            yield BatchRequest(True, indices[rows], seeds if augmented else None)

    def _run(self, requests: Iterator[BatchRequest]) -> Iterator[Batch]:
        self._pass_id = pass_id = self._pass_id + 1
        self._sampler.requests = requests
        self._batches = iter(self._loader)
        while True:
            started = time.monotonic()
            batch = next(self._batches, None)
            self.waited += time.monotonic() - started
            if batch is None:
                return
            if isinstance(batch, BadImageError):
                raise batch
            pixels, labels = (torch.as_tensor(part).to(self._device, non_blocking=True) for part in batch)
            yield to_unit(pixels), labels
            if pass_id != self._pass_id:
                raise RuntimeError("a new pass over the data has begun: this one is over")


def _small_by_value(batch: Batch | BadImageError) -> list[torch.Tensor | np.ndarray] | BadImageError:
    """Small parts as arrays, which pass through the pipe; a tensor is shared by asking its worker for a handle."""
    if isinstance(batch, BadImageError):
        return batch
    return [part if part.nbytes > 1 << 20 else part.numpy() for part in batch]


def _handle_signals(closing: Event, worker: int) -> None:
    """Let a worker ignore SIGINT and SIGTERM, which reach it too, until the pipeline is ``closing``.

    The main process finishes its step and saves first, for which it needs them.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if closing.is_set() else None)
