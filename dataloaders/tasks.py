"""The stream: which classes form which task, and which images of the source each task may use."""

import hashlib
import itertools
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dataloaders import DATASETS
from dataloaders.base import DataError, DataSource, ImageSubset, random_state, seeded_split
from utils.config import DataConfig


class ClassRange(NamedTuple):
    """The classes [start, stop) of a task."""

    start: int
    stop: int


def split_classes(num_classes: int, first: int | None, other: int | None) -> list[ClassRange]:
    """Tasks of ``first``, then ``other`` classes each; the last one is smaller if that does not divide.

    Where one is None it is as the other; where both are, there are 10 tasks, or as many as get two classes each, whose
    sizes differ by at most 1.
    """
    if first is None and other is None:
        tasks = max(1, min(10, num_classes // 2))
        bounds = [num_classes * task // tasks for task in range(tasks + 1)]
        return [ClassRange(a, b) for a, b in itertools.pairwise(bounds)]
    first, other = first or other, other or first
    starts = [0, *range(first, num_classes, other)]
    return [ClassRange(a, b) for a, b in zip(starts, [*starts[1:], num_classes], strict=True)]


class TaskStream:
    """A data set as a sequence of tasks.

    Labels are those of the stream: tasks are contiguous ranges of them. With ``class_order: natural`` they
    are the source's own. Raises DataError if a task would have no training images or no test images.

    Args:
        source: the images; its test part is not loaded with ``validation``.
        seed: of the class order, the validation split and the replay.
        image_size: edge of the model's input in pixels.

    Attributes:
        num_classes, class_names (in the stream's label order), split, drawn_split, seed, image_size.
        train_images, test_images: what is used of the source.
        train_transform, test_transform: Pillow image -> Pillow image of the input size.
    """

    def __init__(self, source: DataSource, config: DataConfig, *, seed: int, image_size: int) -> None:
        from dataloaders.transforms import EvalTransform, TrainTransform  # here: split_classes needs no torch

        self.num_classes = len(source.class_names)
        self.split, self.drawn_split = source.split, source.drawn_split
        self.seed, self.memory, self.image_size = seed, config.memory, image_size
        self.test_transform = EvalTransform(image_size, source.test_crop)
        self.train_transform = self.test_transform
        if config.train_aug:
            self.train_transform = TrainTransform(image_size, config.crop_scale)

        order = np.arange(self.num_classes)
        if config.class_order == "shuffled":
            order = random_state(seed, "class order").permutation(self.num_classes)
        self.class_names = [source.class_names[label] for label in order]
        new_label = np.argsort(order)  # source label -> label of the stream

        store, labels = source.load(train=True)
        if config.validation:
            held_out = seeded_split(labels, 0.2, random_state(seed, "validation"))
            self.train_images = ImageSubset(store, new_label[labels], np.flatnonzero(~held_out))
            self.test_images = ImageSubset(store, new_label[labels], np.flatnonzero(held_out))
        else:
            self.train_images = ImageSubset(store, new_label[labels], np.arange(len(labels)))
            store, labels = source.load(train=False)
            self.test_images = ImageSubset(store, new_label[labels], np.arange(len(labels)))

        first = self.num_classes if config.upper_bound else config.first_split_size
        self._classes = split_classes(self.num_classes, first, config.other_split_size)
        for task in range(len(self)):
            if not (self.train_size(task) and self.test_size(task)):
                part = "test" if self.train_size(task) else "training"
                names = ", ".join(self.task_names(task)[:3]) + (", ..." if len(self.task_names(task)) > 3 else "")
                raise DataError(f"task {task + 1} ({names}) has no {part} images: check the folders in dataroot")

    def __len__(self) -> int:
        return len(self._classes)

    def classes(self, task: int) -> ClassRange:
        return self._classes[task]

    def task_names(self, task: int) -> list[str]:
        """Names of the task's classes."""
        return self.class_names[slice(*self._classes[task])]

    def train_indices(self, task: int) -> np.ndarray:
        """int64 [train_size(task)], indices into ``train_images.store``, without replay."""
        return self.train_images.of_classes(self._classes[task])

    def test_indices(self, task: int) -> np.ndarray:
        """int64 [test_size(task)], indices into ``test_images.store``."""
        return self.test_images.of_classes(self._classes[task])

    def train_size(self, task: int) -> int:
        """The number of the task's training images, without replay."""
        return len(self.train_indices(task))

    def test_size(self, task: int) -> int:
        return len(self.test_indices(task))

    def coreset(self, task: int) -> np.ndarray:
        """The images of past tasks kept for replay during ``task``: int64 [at most memory], class-balanced.

        Every class has a fixed seeded order of its images and keeps the first of them, so that a later
        coreset holds no image that an earlier one had dropped.
        """
        rank = random_state(self.seed, "coreset").permutation(self.num_classes)  # of classes for what is left over
        places = []
        for label in range(self._classes[task].start if self.memory else 0):
            images = self.train_images.of_classes((label, label + 1))
            order = random_state(self.seed, "coreset", label).permutation(images)
            places += [(number, rank[label], image) for number, image in enumerate(order)]
        return np.sort(np.array([image for *_, image in sorted(places)[: self.memory]], dtype=np.int64))

    def replay(self, task: int) -> np.ndarray:
        """As many draws (with replacement) from the coreset as the task has images; none if the coreset is empty."""
        coreset = self.coreset(task)
        draws = self.train_size(task) if len(coreset) else 0
        return coreset[random_state(self.seed, "replay", task).randint(0, max(len(coreset), 1), size=draws)]

    def class_weights(self, task: int) -> np.ndarray:
        """Weights in the loss, inverse to the classes' frequency in the task's training set with replay.

        float32 [num_classes], with mean 1 over the classes that occur, and 1 elsewhere.
        """
        seen = np.concatenate([self.train_indices(task), self.replay(task)])
        counts = np.bincount(self.train_images.labels[seen], minlength=self.num_classes)
        inverse = 1.0 / counts[counts > 0]
        weights = np.ones(self.num_classes, dtype=np.float32)
        weights[counts > 0] = inverse / inverse.mean()
        return weights

    def missing(self) -> list[str]:
        """Names of the images that the split lists and that do not exist."""
        return [name for part in self._parts() for name in part.store.missing()]

    def digest(self) -> str:
        """SHA-256 of all images (see :meth:`dataloaders.base.FileStore.digest`) and their labels."""
        content = [part.store.digest() + part.labels.tobytes() for part in self._parts()]
        return hashlib.sha256(b"".join(content)).hexdigest()

    def _parts(self) -> list[ImageSubset]:
        """The training and the test images; only one of them where they share their store."""
        return list({id(part.store): part for part in (self.train_images, self.test_images)}.values())


def build_stream(
    config: DataConfig, *, seed: int, image_size: int, resumed_dir: Path | None = None, progress: bool = True
) -> TaskStream:
    """Find or download the data set and split it into tasks of images of ``image_size`` pixels.

    The other arguments, and the errors, are those of :class:`dataloaders.base.DataSource`.
    """
    source = DATASETS[config.dataset].load()(config, seed=seed, resumed_dir=resumed_dir, progress=progress)
    return TaskStream(source, config, seed=seed, image_size=image_size)
