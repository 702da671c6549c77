"""Image files in class folders."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from dataloaders.base import DataError, FileStore, random_state, seeded_split

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


def subfolders(folder: Path) -> list[str]:
    """Names of the folders (and links to folders) in ``folder``, sorted; hidden ones are left out.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with os.scandir(folder) as entries:
            return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    except OSError as error:
        raise DataError(f"cannot read the folder {folder}: {error.strerror}") from error


def find_images(root: Path, folder: str) -> Iterator[str]:
    """Images in ``root/folder`` and the folders in it, in order, relative to ``root``.

    Links are followed, but no folder is entered from within itself. Hidden files and files that are no images
    by their ending are left out; a link that leads nowhere is kept, for it is named as a bad image later.

    Raises:
        DataError: a folder cannot be read.
    """
    yield from _visit(str(root), folder, frozenset())


def _visit(root: str, folder: str, within: frozenset[tuple[int, int]]) -> Iterator[str]:
    path = os.path.join(root, folder)
    try:
        status = os.stat(path)
        inside = (status.st_dev, status.st_ino)
        if inside in within:
            return
        with os.scandir(path) as entries:
            listing = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"cannot read the folder {path}: {error.strerror}") from error
    for entry in listing:
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _visit(root, f"{folder}/{entry.name}", within | {inside})
        elif entry.name.lower().endswith(IMAGE_SUFFIXES):
            if entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path)):
                yield f"{folder}/{entry.name}"


class LabelledFiles:
    """Image files with their labels.

    Attributes:
        paths: relative to ``dataroot``, with forward slashes.
        labels: int64 [n].
    """

    def __init__(self, paths: list[str], labels: Iterable[int]) -> None:
        self.paths = paths
        self.labels = np.asarray(labels, dtype=np.int64)

    @classmethod
    def from_classes(cls, root: Path, parent: str, class_names: Iterable[str]) -> LabelledFiles:
        """All images below ``root/parent/<class name>``; a class without any has none."""
        paths: list[str] = []
        labels: list[int] = []
        for label, name in enumerate(class_names):
            folder = f"{parent}/{name}" if parent else name
            images = list(find_images(root, folder)) if (root / folder).is_dir() else []
            paths += images
            labels += [label] * len(images)
        return cls(paths, labels)

    @classmethod
    def joined(cls, parts: Iterable[LabelledFiles]) -> LabelledFiles:
        """Several lists one after the other."""
        parts = list(parts)
        return cls([p for part in parts for p in part.paths], np.concatenate([part.labels for part in parts]))

    def store(self, root: Path) -> tuple[FileStore, np.ndarray]:
        """The images for a :class:`dataloaders.base.ImageSource` to hand out."""
        return FileStore(root, self.paths), self.labels

    def seeded_split(self, seed: int) -> tuple[LabelledFiles, LabelledFiles]:
        """Four fifths for training and one for testing, by class, drawn with the seed."""
        test = seeded_split(self.labels, 0.2, random_state(seed, "split"))
        return self._pick(~test), self._pick(test)

    def _pick(self, chosen: np.ndarray) -> LabelledFiles:
        return LabelledFiles([self.paths[i] for i in np.flatnonzero(chosen)], self.labels[chosen])
