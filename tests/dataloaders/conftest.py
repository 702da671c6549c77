"""Small data sets of the real layouts, made on the spot."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

from dataloaders.base import ArrayStore, DataSource
from dataloaders.loader import DataPipeline
from dataloaders.tasks import TaskStream
from utils.config import DataConfig


def picture(seed: int, size: tuple[int, int] = (12, 10)) -> Image.Image:
    """Random pixels; ``size`` is (width, height)."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


def config(**settings) -> DataConfig:
    """Settings of tests: two classes a task, batches of four, no workers."""
    return DataConfig(**{"first_split_size": 2, "other_split_size": 2, "batch_size": 4, "workers": 0, **settings})


class ArraySource(DataSource):
    """Random 12x12 images in memory, ``counts[c]`` of class c for training and 3 for testing."""

    test_crop = "stretch"
    counts = (6, 6, 6, 6, 6)

    def find(self) -> None:
        self.split = "official"
        self.class_names = [f"class {label}" for label in range(len(self.counts))]

    def load(self, train: bool) -> tuple[ArrayStore, np.ndarray]:
        labels = np.repeat(np.arange(len(self.counts)), self.counts if train else 3)
        pixels = np.random.default_rng(int(train)).integers(0, 256, (len(labels), 12, 12, 3), dtype=np.uint8)
        return ArrayStore(pixels, "train" if train else "test"), labels


def array_stream(counts=ArraySource.counts, *, seed: int = 0, **settings) -> TaskStream:
    """A stream over images in memory."""
    settings = config(**settings)
    source = type("Source", (ArraySource,), {"counts": counts})(settings, seed=seed)
    return TaskStream(source, settings, seed=seed, image_size=16)


def pipeline(stream: TaskStream, *, rank: int = 0, world_size: int = 1, **settings) -> DataPipeline:
    """A pipeline on the CPU with seed 7."""
    parallel = SimpleNamespace(device=torch.device("cpu"), rank=rank, world_size=world_size)
    return DataPipeline(stream, config(**settings), seed=7, parallel=parallel)


def class_folders(root: Path, classes: list[str], images: int, suffix: str = ".jpg") -> None:
    """``root/<class>/<0...>.jpg``, all different."""
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(images):
            picture(1000 * label + number).save(root / name / f"{number}{suffix}")


def names(part) -> list[str]:
    """The names of a source's training or test images."""
    store, labels = part
    assert len(store) == len(labels) and labels.dtype == np.int64
    return [store.name(i) for i in range(len(store))]
