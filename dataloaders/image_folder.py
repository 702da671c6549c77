"""Any folder of class folders."""

import logging
from pathlib import Path

from dataloaders.base import DataError
from dataloaders.folders import FileSource, find_images, list_classes, split_by_class, subfolders
from utils.config import DataConfig

_log = logging.getLogger(__name__)

_TRAIN, _TEST = "train", ("val", "test", "valid", "validation")


class ImageFolder(FileSource):
    """Images of your own: ``dataroot/<class>/*`` or ``dataroot/{train,val}/<class>/*`` (or ``test``).

    Folders within a class folder belong to the class. Classes are numbered by name. Without ``train`` and ``val``, a
    fifth of each class, drawn with the seed, is for testing.
    """

    def find(self) -> None:
        train, test = _parts(self.root)
        self.class_names = _class_names(self.root)
        self.train = list_classes(self.root, train, self.class_names)
        if test is None:
            self.split = "seeded"
            self.train, self.test = split_by_class(self.train, self.seed)
            return
        self.split = "folder"
        if unknown := sorted(set(subfolders(self.root / test)) - set(self.class_names)):
            _log.warning("%s: no class %s, left out of %s", self.root / train, ", ".join(unknown), test)
        self.test = list_classes(self.root, test, self.class_names)

    @classmethod
    def missing(cls, config: DataConfig) -> list[str]:
        root = config.dataroot
        if not root.is_dir():
            return [f"dataset ImageFolder: dataroot {root} is not a folder; it should hold the class folders"]
        try:
            names = _class_names(root)
        except DataError as error:
            return [str(error)]
        if len(names) >= 2:
            return []
        return [
            f"dataset ImageFolder: {len(names)} class folders with images in {root}; expected "
            "<class>/*.jpg, or train/<class>/*.jpg and val/<class>/*.jpg, of at least two classes"
        ]

    @classmethod
    def count_classes(cls, dataroot: Path) -> int | None:
        try:
            return len(_class_names(dataroot)) or None
        except DataError:
            return None


def _parts(root: Path) -> tuple[str, str | None]:
    """The folders of training and test classes in ``root``; (``""``, None) if one serves for both."""
    folders = subfolders(root)
    tests = [name for name in _TEST if name in folders]
    return (_TRAIN, tests[0]) if _TRAIN in folders and tests else ("", None)


def _class_names(root: Path) -> list[str]:
    """The class folders that hold an image, by name."""
    folder = root / _parts(root)[0]
    return [name for name in subfolders(folder) if any(find_images(folder, name))]
