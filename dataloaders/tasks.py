"""The stream: which classes form which task, and which images of the source each task may use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from dataloaders.base import DataError, ImageStore, SplitKind, random_state, seeded_split

if TYPE_CHECKING:
    from dataloaders.transforms import EvalTransform, TrainTransform


class ClassRange(NamedTuple):
    """The classes [start, stop) of a task."""

    start: int
    stop: int


@dataclass(frozen=True)
class Images:
    """The images of a source that a stream uses, with the labels of the stream.

    Attributes:
        store: all images of the source's training or test part.
        labels: int64 [len(store)], in the stream's label order.
        used: int64 [n], the images of ``store`` that the stream uses, ascending.
    """

    store: ImageStore
    labels: np.ndarray
    used: np.ndarray

    def of_classes(self, classes: ClassRange) -> np.ndarray:
        """Indices into ``store`` of the used images of these classes, ascending."""
        labels = self.labels[self.used]
        return self.used[(labels >= classes.start) & (labels < classes.stop)]


def split_classes(num_classes: int, first: int, other: int) -> list[ClassRange]:
    """Tasks of ``first``, then ``other`` classes each; a smaller last one when that does not divide."""
    starts = [0, *range(first, num_classes, other)]
    return [ClassRange(a, b) for a, b in zip(starts, [*starts[1:], num_classes], strict=True)]


class TaskStream:
    """A data set as a sequence of tasks.

    Labels are those of the stream: tasks are contiguous ranges of them. With ``class_order="natural"`` they
    are the source's own.

    Args:
        train, test: the source's images and labels (int64 [n]); ``test`` is not used with ``validation``.
        class_names: in the source's label order.
        split: where the division into training and test images comes from.
        first_split_size, other_split_size: classes of the first and of every other task.
        class_order: ``natural``, or ``shuffled`` by a permutation drawn with the seed.
        seed: of the class order, the validation split and the replay.
        validation: evaluate on a seeded fifth of the training images, which are then not trained on.
        upper_bound: one task with all classes.
        memory: size of the class-balanced coreset of past tasks that is replayed; 0 replays nothing.
        train_transform, test_transform: Pillow image -> Pillow image of the input size.

    Attributes:
        num_classes, class_names (in the stream's label order), split, image_size.

    Raises:
        DataError: a task would have no training images or no test images.
    """

    def __init__(
        self,
        train: tuple[ImageStore, np.ndarray],
        test: tuple[ImageStore, np.ndarray] | None,
        *,
        class_names: Sequence[str],
        split: SplitKind,
        first_split_size: int,
        other_split_size: int,
        train_transform: TrainTransform | EvalTransform,
        test_transform: EvalTransform,
        class_order: Literal["natural", "shuffled"] = "natural",
        seed: int = 0,
        validation: bool = False,
        upper_bound: bool = False,
        memory: int = 0,
    ) -> None:
        self.num_classes = len(class_names)
        self.split = split
        self.seed = seed
        self.memory = memory
        self.train_transform = train_transform
        self.test_transform = test_transform
        self.image_size = test_transform.size
        order = np.arange(self.num_classes)
        if class_order == "shuffled":
            order = random_state(seed, "class order").permutation(self.num_classes)
        self.class_names = [class_names[label] for label in order]
        new_label = np.argsort(order)  # source label -> label of the stream

        store, labels = train
        held_out = np.zeros(len(labels), dtype=bool)
        if validation:
            held_out = seeded_split(labels, 0.2, random_state(seed, "validation"))
            test = train
        elif test is None:
            raise ValueError("a stream without validation needs test images")
        test_used = np.flatnonzero(held_out) if validation else np.arange(len(test[1]))
        self.train_images = Images(store, new_label[labels], np.flatnonzero(~held_out))
        self.test_images = Images(test[0], new_label[test[1]], test_used)

        sizes = (self.num_classes, self.num_classes) if upper_bound else (first_split_size, other_split_size)
        self._classes = split_classes(self.num_classes, *sizes)
        self._replays: dict[int, np.ndarray] = {}
        self._require_images()

    @property
    def augmented(self) -> bool:
        """Whether training images are augmented, and so need a seed each."""
        return self.train_transform is not self.test_transform

    def __len__(self) -> int:
        return len(self._classes)

    def classes(self, task: int) -> ClassRange:
        """The classes of a task."""
        return self._classes[task]

    def task_names(self, task: int) -> list[str]:
        """The class names of a task."""
        return self.class_names[slice(*self._classes[task])]

    def train_indices(self, task: int) -> np.ndarray:
        """int64 [train_size(task)], indices into ``train_images.store``; no replay."""
        return self.train_images.of_classes(self._classes[task])

    def test_indices(self, task: int) -> np.ndarray:
        """int64 [test_size(task)], indices into ``test_images.store``."""
        return self.test_images.of_classes(self._classes[task])

    def train_size(self, task: int) -> int:
        """The number of the task's own training images."""
        return len(self.train_indices(task))

    def test_size(self, task: int) -> int:
        """The number of the task's test images."""
        return len(self.test_indices(task))

    def coreset(self, task: int) -> np.ndarray:
        """The images of past tasks kept for replay during ``task``: int64 [at most memory], class-balanced.

        Every class has a fixed seeded order of its images and keeps the first of them, so that a later
        coreset holds no image that an earlier one had dropped.
        """
        past = self._classes[task].start
        members = [self.train_images.of_classes(ClassRange(c, c + 1)) for c in range(past)]
        rank = random_state(self.seed, "coreset").permutation(self.num_classes)
        kept = balanced_counts(np.array([len(m) for m in members], dtype=np.int64), rank[:past], self.memory)
        chosen = [
            random_state(self.seed, "coreset", label).permutation(members[label])[:number]
            for label, number in enumerate(kept)
        ]
        return np.sort(np.concatenate(chosen)) if chosen else np.empty(0, dtype=np.int64)

    def replay(self, task: int) -> np.ndarray:
        """As many draws (with replacement) from the coreset as the task has images; none without memory."""
        if task not in self._replays:
            coreset = self.coreset(task) if self.memory > 0 else np.empty(0, dtype=np.int64)
            draws = self.train_size(task) if len(coreset) else 0
            rng = random_state(self.seed, "replay", task)
            self._replays[task] = coreset[rng.randint(0, max(len(coreset), 1), size=draws)]
        return self._replays[task]

    def class_weights(self, task: int) -> np.ndarray:
        """Weights of the classes in the loss, inverse to their frequency in the task's training set.

        Returns:
            float32 [num_classes]: mean 1 over the classes that occur (replayed ones included), 1 elsewhere.
        """
        seen = np.concatenate([self.train_indices(task), self.replay(task)])
        counts = np.bincount(self.train_images.labels[seen], minlength=self.num_classes)
        present = counts > 0
        inverse = 1.0 / counts[present]
        weights = np.ones(self.num_classes, dtype=np.float32)
        weights[present] = inverse / inverse.mean()
        return weights

    def missing(self) -> list[str]:
        """Names of the images that the split lists and that are not there."""
        stores = {id(part.store): part.store for part in (self.train_images, self.test_images)}
        return [name for store in stores.values() for name in store.missing()]

    def _require_images(self) -> None:
        for task in range(len(self)):
            for part, number in (("training", self.train_size(task)), ("test", self.test_size(task))):
                if number == 0:
                    names = self.task_names(task)
                    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
                    raise DataError(f"task {task} ({shown}) has no {part} images: check the folders in dataroot")


def balanced_counts(available: np.ndarray, rank: np.ndarray, total: int) -> np.ndarray:
    """How many images each class keeps when ``total`` are shared out as evenly as ``available`` allows.

    Args:
        available: int64 [classes].
        rank: [classes], distinct; classes of low rank get what is left over after even sharing.

    Returns:
        int64 [classes] with sum min(total, available.sum()).
    """
    kept = np.zeros_like(available)
    left = min(total, int(available.sum()))
    while left > 0:
        open_classes = np.flatnonzero(kept < available)
        share = left // len(open_classes)
        if share == 0:
            kept[open_classes[np.argsort(rank[open_classes])[:left]]] += 1
            break
        given = np.minimum(available[open_classes] - kept[open_classes], share)
        kept[open_classes] += given
        left -= int(given.sum())
    return kept
