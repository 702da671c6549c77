"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009), read by torchvision."""

import os
import tempfile
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from dataloaders.base import ArrayStore, DataSource
from dataloaders.download import Checksum, fetch, mirrored


class CIFAR100(DataSource):
    """60,000 photographs of 32x32 pixels: 500 training and 100 test images of each of 100 classes.

    The files in ``dataroot`` are used if they are complete, else the archive in ``dataroot``, else the archive
    is downloaded. torchvision compares the files with their MD5 before it unpickles them.
    """

    test_crop = "stretch"
    num_classes = 100
    folder: ClassVar[str] = "cifar-100-python"

    def find(self) -> None:
        from torchvision import datasets  # here, so that a configuration is checked without torch

        self._dataset = getattr(datasets, type(self).__name__)
        try:
            self._test = self._dataset(self.root, train=False)
        except RuntimeError:  # a file is missing or damaged
            self._install()
            self._test = self._dataset(self.root, train=False)
        self.split, self.class_names = "official", self._test.classes

    def load(self, train: bool) -> tuple[ArrayStore, np.ndarray]:
        images: Any = self._dataset(self.root, train=True) if train else self._test
        store = ArrayStore(images.data, f"{self.folder}/{'train' if train else 'test'}")
        return store, np.array(images.targets, dtype=np.int64)

    def _install(self) -> None:
        """Put the files into ``dataroot``, each of them complete or not at all."""
        from torchvision.datasets.utils import extract_archive

        archive, checksum = self.root / self._dataset.filename, Checksum("md5", self._dataset.tgz_md5)
        fetch(mirrored(self._dataset.url, self.data_url), archive, checksum, progress=self.progress)
        (self.root / self.folder).mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.root) as folder:
            extract_archive(str(archive), folder)
            for file in (Path(folder) / self.folder).iterdir():
                os.replace(file, self.root / self.folder / file.name)


class CIFAR10(CIFAR100):
    """60,000 photographs of 32x32 pixels: 5,000 training and 1,000 test images of each of 10 classes."""

    num_classes = 10
    folder = "cifar-10-batches-py"
