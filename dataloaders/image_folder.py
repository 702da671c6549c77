"""Any folder of class folders."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np

from dataloaders.base import DataError, FileStore, ImageSource
from dataloaders.folders import LabelledFiles, find_images, subfolders

_log = logging.getLogger(__name__)

_TRAIN, _TEST = "train", ("val", "test", "valid", "validation")


class ImageFolder(ImageSource):
    """Images of your own: ``dataroot/<class>/*`` or ``dataroot/{train,val}/<class>/*`` (or ``test``).

    Folders within a class folder belong to the class. Classes are numbered by name, or in the order of the
    lines of ``dataroot/classes.txt``, which then also says which folders are classes. Without ``train`` and
    ``val``, a fifth of each class, drawn with the seed, is for testing.
    """

    def __init__(
        self,
        root: Path,
        *,
        data_url: str | None = None,
        seed: int = 0,
        log_dir: Path | None = None,
        progress: bool = True,
    ) -> None:
        problems = self.preflight(root)
        if problems:
            raise DataError(problems[0])
        self._root = root
        train, test = _parts(root)
        self.class_names = _class_names(root, train)
        files = LabelledFiles.from_classes(root, train, self.class_names)
        if test is None:
            self.split = "seeded"
            self._train, self._test = files.seeded_split(seed)
        else:
            self.split = "folder"
            unknown = sorted(set(subfolders(root / test)) - set(self.class_names))
            if unknown:
                _log.warning("%s: no class %s, left out of %s", root / train, ", ".join(unknown), test)
            self._train, self._test = files, LabelledFiles.from_classes(root, test, self.class_names)

    def load(self, train: bool) -> tuple[FileStore, np.ndarray]:
        return (self._train if train else self._test).store(self._root)

    @classmethod
    def preflight(cls, root: Path, data_url: str | None = None) -> list[str]:
        if not root.is_dir():
            return [f"dataset ImageFolder: dataroot {root} is not a folder; it should hold the class folders"]
        try:
            names = _class_names(root, _parts(root)[0])
        except DataError as error:
            return [str(error)]
        if len(names) < 2:
            return [
                f"dataset ImageFolder: {len(names)} class folders with images in {root}; expected "
                "<class>/*.jpg, or train/<class>/*.jpg and val/<class>/*.jpg, of at least two classes"
            ]
        return []

    @classmethod
    def count_classes(cls, root: Path) -> int | None:
        return None if cls.preflight(root) else len(_class_names(root, _parts(root)[0]))


def _parts(root: Path) -> tuple[str, str | None]:
    """The folders of training and test classes in ``root``; (``""``, None) when one serves for both."""
    folders = subfolders(root)
    tests = [name for name in _TEST if name in folders]
    return (_TRAIN, tests[0]) if _TRAIN in folders and tests else ("", None)


def _class_names(root: Path, part: str) -> list[str]:
    """The classes in label order.

    Raises:
        DataError: ``classes.txt`` names a folder twice, or one that is missing or holds no image.
    """
    with_images = [name for name in subfolders(root / part) if any(find_images(root / part, name))]
    listing = root / "classes.txt"
    if not listing.is_file():
        return with_images
    lines = listing.read_text(encoding="utf-8-sig", errors="surrogateescape").splitlines()
    names = [line.strip() for line in lines if line.strip()]
    for name in names:
        if name not in with_images:
            raise DataError(f"{listing} names the class {name}, but {root / part / name} holds no image")
        if names.count(name) > 1:
            raise DataError(f"{listing} names the class {name} twice")
    return names
