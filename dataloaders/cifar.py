"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009), from the archives of the official page."""

from __future__ import annotations

import io
import logging
import pickle
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from dataloaders.base import ArrayStore, DataError, ImageSource
from dataloaders.download import Checksum, extract, fetch, mirrored, unwritable

_log = logging.getLogger(__name__)

# All that the archives' pickles refer to (they were written by Python 2), and where it lives today.
_ALLOWED = {
    (module, name)
    for name in ("_reconstruct", "ndarray", "dtype", "_frombuffer")
    for module in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray", "numpy._core.numeric")
} | {("_codecs", "encode")}


class _ArrayUnpickler(pickle.Unpickler):
    """Reads arrays, strings and numbers; a pickle that would call anything else is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}")
        return super().find_class(module, name)


class CIFAR100(ImageSource):
    """60,000 photographs of 32x32 pixels: 500 training and 100 test images of each of 100 classes.

    ``dataroot/cifar-100-python`` is used when its files are complete, else the archive in ``dataroot``, else
    the archive is downloaded. Files are compared with their MD5 before they are opened.
    """

    test_crop = "stretch"
    url: ClassVar[str] = "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"
    archive_md5: ClassVar[str] = "eb9058c3a382ffc7106e4002c42a8d85"
    folder: ClassVar[str] = "cifar-100-python"
    train_files: ClassVar[dict[str, str]] = {"train": "16019d7e3df5f24257cddd939b257f8d"}
    test_files: ClassVar[dict[str, str]] = {"test": "f0ef6b0ae62326f3e7ffdfab6717acfc"}
    meta_files: ClassVar[dict[str, str]] = {"meta": "7973b15100ade9c7d40fb424638fde48"}
    labels_key: ClassVar[str] = "fine_labels"
    names_key: ClassVar[str] = "fine_label_names"

    def __init__(
        self,
        root: Path,
        *,
        data_url: str | None = None,
        seed: int = 0,
        log_dir: Path | None = None,
        progress: bool = True,
    ) -> None:
        self._root = root
        self.split = "official"
        if not self._complete(root):
            archive = root / self._archive_name()
            if not Checksum("md5", self.archive_md5).matches(archive):
                if archive.exists():
                    _log.warning("%s is not the complete archive and is downloaded again", archive)
                url = mirrored(self.url, data_url)
                fetch(url, archive, Checksum("md5", self.archive_md5), progress=progress)
            extract(archive, root, [f"{self.folder}/{name}" for name in self._files()])
            if not self._complete(root):
                raise DataError(f"{archive}: its files are not those of {type(self).__name__}")
        self.class_names = self._read(next(iter(self.meta_files)))[self.names_key]

    def load(self, train: bool) -> tuple[ArrayStore, np.ndarray]:
        parts = [self._read(name) for name in (self.train_files if train else self.test_files)]
        pixels = np.concatenate([part["data"] for part in parts]).reshape(-1, 3, 32, 32)
        labels = np.concatenate([np.asarray(part[self.labels_key], dtype=np.int64) for part in parts])
        name = f"{self.folder}/{'train' if train else 'test'}"
        return ArrayStore(np.ascontiguousarray(pixels.transpose(0, 2, 3, 1)), name), labels

    @classmethod
    def preflight(cls, root: Path, data_url: str | None = None) -> list[str]:
        present = all((root / cls.folder / name).is_file() for name in cls._files())
        problem = None if present else unwritable(root)
        if problem is None:
            return []
        return [f"dataset {cls.__name__} cannot be downloaded to dataroot {root}: {problem}"]

    @classmethod
    def _files(cls) -> dict[str, str]:
        return cls.train_files | cls.test_files | cls.meta_files

    @classmethod
    def _archive_name(cls) -> str:
        return cls.url.rpartition("/")[2]

    def _complete(self, root: Path) -> bool:
        folder = root / self.folder
        return all(Checksum("md5", md5).matches(folder / name) for name, md5 in self._files().items())

    def _read(self, name: str) -> dict[str, Any]:
        path = self._root / self.folder / name
        try:
            return _ArrayUnpickler(io.BytesIO(path.read_bytes()), encoding="latin1").load()
        except (OSError, EOFError, pickle.UnpicklingError, AttributeError, ValueError) as error:
            raise DataError(f"cannot read {path}: {error}") from error


class CIFAR10(CIFAR100):
    """60,000 photographs of 32x32 pixels: 5,000 training and 1,000 test images of each of 10 classes."""

    url = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
    archive_md5 = "c58f30108f718f92721af3b95e74349a"
    folder = "cifar-10-batches-py"
    train_files = {
        "data_batch_1": "c99cafc152244af753f735de768cd75f",
        "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
        "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
        "data_batch_4": "634d18415352ddfa80567beed471001a",
        "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    }
    test_files = {"test_batch": "40351d587109b95175f43aff81a1287e"}
    meta_files = {"batches.meta": "5ff9c542aee3614f3951f8cda6e48888"}
    labels_key = "labels"
    names_key = "label_names"
