"""Image files in class folders."""

import errno
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from dataloaders.base import DataError, DataSource, FileStore, random_state, seeded_split

FileList = list[tuple[str, int]]
"""Image files with their labels; paths are relative to ``dataroot``, with forward slashes."""

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


def subfolders(folder: Path) -> list[str]:
    """Sorted names of the folders in ``folder`` without hidden ones; DataError if it cannot be read."""
    try:
        return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError as error:
        raise DataError(f"cannot read the folder {error.filename}: {error.strerror}") from error


def find_images(root: Path, folder: str, within: frozenset[tuple[int, int]] = frozenset()) -> Iterator[str]:
    """Images in ``root/folder`` and the folders in it, in order, relative to ``root``.

    Links are followed, but no folder is entered from within itself: ``within`` identifies the folders above it.
    Hidden files and other endings are left out; a link to nowhere or itself is kept, to be reported as a bad image.
    Raises DataError for a folder that cannot be read.
    """
    try:
        status = os.stat(root / folder)
        own = (status.st_dev, status.st_ino)
        if own in within:
            return
        with os.scandir(root / folder) as entries:
            listing = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"cannot read the folder {root / folder}: {error.strerror}") from error
    for entry in listing:
        if entry.name.startswith("."):
            continue
        if _is_folder(entry):
            yield from find_images(root, f"{folder}/{entry.name}", within | {own})
        elif entry.name.lower().endswith(IMAGE_SUFFIXES) and (entry.is_symlink() or entry.is_file()):
            yield f"{folder}/{entry.name}"


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno == errno.ELOOP:
            return False
        raise DataError(f"cannot read {entry.path}: {error.strerror}") from error


def list_classes(root: Path, parent: str, class_names: Sequence[str]) -> FileList:
    """All images below ``root/parent/<class name>``; a class without that folder has none."""
    folders = [f"{parent}/{name}" if parent else name for name in class_names]
    present = [(label, folder) for label, folder in enumerate(folders) if (root / folder).is_dir()]
    return [(path, label) for label, folder in present for path in find_images(root, folder)]


def split_by_class(files: FileList, seed: int) -> tuple[FileList, FileList]:
    """Four fifths for training and one for testing, drawn with the seed in each class."""
    tested = seeded_split(_labels(files), 0.2, random_state(seed, "split"))
    return [files[i] for i in np.flatnonzero(~tested)], [files[i] for i in np.flatnonzero(tested)]


def _labels(files: FileList) -> np.ndarray:
    return np.array([label for _, label in files], dtype=np.int64)


class FileSource(DataSource):
    """A data set of image files below ``dataroot``.

    Attributes:
        upright: whether images are turned as their EXIF orientation tells.
        train, test: the files, set by :meth:`find`.
    """

    upright: ClassVar[bool] = True
    train: FileList
    test: FileList

    def load(self, train: bool) -> tuple[FileStore, np.ndarray]:
        files = self.train if train else self.test
        return FileStore(self.root, [path for path, _ in files], self.upright), _labels(files)
