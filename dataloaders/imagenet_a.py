"""ImageNet-A (Hendrycks et al. 2021)."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dataloaders.base import DataError, FileStore, ImageSource
from dataloaders.folders import LabelledFiles, subfolders

NUM_CLASSES = 200
ARCHIVE_URL = "https://people.eecs.berkeley.edu/~hendrycks/imagenet-a.tar"


class ImageNetA(ImageSource):
    """7,500 photographs of 200 ImageNet classes that a ResNet-50 gets wrong: ``dataroot/imagenet-a/<wnid>``.

    There is no official split: a fifth of each class, drawn with the seed, is for testing.
    """

    folder = "imagenet-a"

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
        self.split = "seeded"
        self.class_names = subfolders(root / self.folder)
        if len(self.class_names) != NUM_CLASSES:
            raise DataError(
                f"{root / self.folder} has {len(self.class_names)} class folders instead of {NUM_CLASSES}: "
                f"unpack {ARCHIVE_URL} again, or use dataset: ImageFolder for images of your own"
            )
        files = LabelledFiles.from_classes(root, self.folder, self.class_names)
        self._train, self._test = files.seeded_split(seed)

    def load(self, train: bool) -> tuple[FileStore, np.ndarray]:
        return (self._train if train else self._test).store(self._root)

    @classmethod
    def preflight(cls, root: Path, data_url: str | None = None) -> list[str]:
        if (root / cls.folder).is_dir():
            return []
        return [
            f"dataset ImageNet_A: no folder {root / cls.folder}; get {ARCHIVE_URL} and unpack it into "
            f"dataroot, so that {root / cls.folder}/n01498041 and 199 others like it are there"
        ]
