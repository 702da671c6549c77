"""Small data sets of the real layouts, made on the spot."""

from __future__ import annotations

import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataloaders.base import ArrayStore, FileStore
from dataloaders.download import Checksum
from dataloaders.tasks import TaskStream
from dataloaders.transforms import EvalTransform, TrainTransform


def picture(seed: int, size: tuple[int, int] = (12, 10), mode: str = "RGB") -> Image.Image:
    """Random pixels; ``size`` is (width, height)."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).convert(mode)


def random_store(rng: np.random.Generator, images: int, name: str) -> ArrayStore:
    return ArrayStore(rng.integers(0, 256, (images, 12, 12, 3), dtype=np.uint8), name)


def array_stream(counts=(6, 6, 6, 6, 6), *, size: int = 16, train_aug: bool = True, **settings) -> TaskStream:
    """A stream over random 12x12 images in memory: ``counts[c]`` of class c for training, 3 for testing."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(len(counts)), counts)
    test_labels = np.repeat(np.arange(len(counts)), 3)
    test_transform = EvalTransform(size, "stretch")
    return TaskStream(
        (random_store(rng, len(labels), "train"), labels),
        (random_store(rng, len(test_labels), "test"), test_labels),
        class_names=[f"class {c}" for c in range(len(counts))],
        split="official",
        train_transform=TrainTransform(size) if train_aug else test_transform,
        test_transform=test_transform,
        **{"first_split_size": 2, "other_split_size": 2, **settings},
    )


def file_stream(root: Path, paths: list[str], size: int = 16) -> TaskStream:
    """A stream with one task of one class over image files, which serve for training and for testing."""
    part = (FileStore(root, paths), np.zeros(len(paths), dtype=np.int64))
    return TaskStream(
        part,
        part,
        class_names=["only"],
        split="folder",
        first_split_size=1,
        other_split_size=1,
        train_transform=TrainTransform(size),
        test_transform=EvalTransform(size),
    )


def class_folders(root: Path, classes: list[str], images: int, suffix: str = ".jpg") -> None:
    """``root/<class>/<0...>.jpg``, all different."""
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(images):
            picture(1000 * label + number).save(root / name / f"{number}{suffix}")


def tar_of(files: dict[str, bytes]) -> bytes:
    """A gzipped tar archive."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def md5(content: bytes) -> str:
    return Checksum("md5", "").of(io.BytesIO(content))


@pytest.fixture
def cifar_archive(monkeypatch):
    """A small archive of the layout of CIFAR-100: 4 training and 2 test images a class."""
    from dataloaders.cifar import CIFAR100

    rng = np.random.default_rng(0)

    def part(images: int) -> bytes:
        labels = np.tile(np.arange(100), images).tolist()
        pixels = rng.integers(0, 256, (len(labels), 3072), dtype=np.uint8)
        return pickle.dumps({"data": pixels, "fine_labels": labels, "coarse_labels": labels}, protocol=2)

    meta = pickle.dumps({"fine_label_names": [f"name {c}" for c in range(100)]}, protocol=2)
    files = {"train": part(4), "test": part(2), "meta": meta}
    archive = tar_of({f"cifar-100-python/{name}": content for name, content in files.items()})
    monkeypatch.setattr(CIFAR100, "archive_md5", md5(archive))
    for name in ("train", "test", "meta"):
        monkeypatch.setattr(CIFAR100, f"{name}_files", {name: md5(files[name])})
    return archive
