"""The interface of a data set: raw images and labels from files, without any notion of tasks.

Importing this module imports no torch, so that a configuration is checked quickly.
"""

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from PIL import Image, ImageOps

from utils.config import ConfigError, DataConfig

# Pillow knows more, but hands some of them to other programs: EPS to Ghostscript.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")

TestCrop = Literal["stretch", "center_crop"]
SplitKind = Literal["authors", "official", "seeded", "folder"]


class DataError(ConfigError):
    """Data that cannot be used; one sentence that names the file or value and the way out."""


class BadImageError(DataError):
    """An image file that is missing, empty or damaged."""

    def __init__(self, path: str | Path, reason: str) -> None:
        # A file name that is not valid UTF-8 must not keep the sentence from being printed.
        super().__init__(f"cannot read the image {path}: {reason}".encode(errors="replace").decode())
        self._origin = str(path), reason

    def __reduce__(self) -> "tuple[type[BadImageError], tuple[str, str]]":
        return type(self), self._origin  # a worker sends it


class FileStore:
    """Image files below ``root``, opened when asked for; ``paths`` are relative to it, with forward slashes.

    Workers get a copy, so it holds an array rather than one Python object per image.
    """

    def __init__(self, root: Path, paths: Iterable[str], upright: bool = True) -> None:
        self._root, self._upright = str(root), upright
        self._paths = np.array([os.fsencode(path) for path in paths], dtype=bytes)

    def __len__(self) -> int:
        return len(self._paths)

    def open(self, index: int) -> Image.Image:
        """Image ``index`` as a Pillow image of mode RGB; raises :class:`BadImageError`."""
        return read_image(os.path.join(self._root, self.name(index)), upright=self._upright)

    def name(self, index: int) -> str:
        """Path of image ``index`` relative to ``root``."""
        return os.fsdecode(self._paths[index])

    def digest(self) -> bytes:
        """A hash of the files' names and sizes, since reading them all would take too long."""
        return hashlib.sha256(self._paths.tobytes() + self._sizes().tobytes()).digest()

    def missing(self) -> list[str]:
        """Names of the images that do not exist."""
        return [self.name(index) for index in np.flatnonzero(self._sizes() < 0)]

    def _sizes(self) -> np.ndarray:
        """Sizes of the files in bytes, int64 [n]; -1 for one that does not exist."""
        return np.array([_file_size(os.path.join(self._root, self.name(index))) for index in range(len(self))])


class ArrayStore:
    """Decoded images in memory, uint8 [n, H, W, 3], used like a :class:`FileStore`.

    Messages call them ``name`` and add the index.
    """

    def __init__(self, images: np.ndarray, name: str) -> None:
        import torch  # here, so that importing this module stays cheap

        # Between processes a tensor is sent as a handle of shared memory, a numpy array would be copied.
        self._images = torch.from_numpy(np.ascontiguousarray(images))
        self._name = name

    def __len__(self) -> int:
        return len(self._images)

    def open(self, index: int) -> Image.Image:
        return Image.fromarray(self._images[index].numpy())

    def name(self, index: int) -> str:
        return f"{self._name}[{index}]"

    def digest(self) -> bytes:
        return hashlib.sha256(self._images.numpy()).digest()

    def missing(self) -> list[str]:
        return []


ImageStore = FileStore | ArrayStore


@dataclass(frozen=True)
class ImageSubset:
    """The images of a source's training or test part that a stream uses, with the labels of the stream."""

    store: ImageStore
    labels: np.ndarray  # int64 [len(store)]
    used: np.ndarray  # int64 [n], indices into store, ascending

    def of_classes(self, classes: tuple[int, int]) -> np.ndarray:
        """Indices into ``store`` of the used images of the classes [start, stop), ascending."""
        labels = self.labels[self.used]
        return self.used[(labels >= classes[0]) & (labels < classes[1])]


class DataSource(ABC):
    """The raw files of one data set; the constructor finds them, or downloads them where that is possible.

    Args:
        config: ``dataroot`` and ``data_url`` are used here.
        seed: for the split of a data set that has none.
        resumed_dir: log_dir of the run that is being resumed; None for a new run.
        progress: whether downloads show a progress bar.

    Attributes:
        num_classes: None where the files decide it, see :meth:`count_classes`.
        class_names: names in label order.
        split: origin of the division into training and test images.
        test_crop: how test images reach the input size: ``stretch`` resizes both sides, ``center_crop``
            resizes the shorter side to 256/224 of the input size and cuts out the centre.
        drawn_split: files (name -> content) that list a split drawn in place of the authors'; kept in log_dir.
    """

    test_crop: ClassVar[TestCrop] = "center_crop"
    num_classes: ClassVar[int | None] = None
    class_names: Sequence[str]
    split: SplitKind

    def __init__(
        self, config: DataConfig, *, seed: int, resumed_dir: Path | None = None, progress: bool = True
    ) -> None:
        if problems := self.missing(config):
            raise DataError(problems[0])
        self.root, self.data_url = config.dataroot, config.data_url
        self.seed, self.resumed_dir, self.progress = seed, resumed_dir, progress
        self.drawn_split: dict[str, bytes] = {}
        self.find()

    @abstractmethod
    def find(self) -> None:
        """Find or download the files and set ``class_names`` and ``split``."""

    @abstractmethod
    def load(self, train: bool) -> tuple[ImageStore, np.ndarray]:
        """The training or the test images, and their labels, int64 [n]."""

    @classmethod
    def missing(cls, config: DataConfig) -> list[str]:
        """Problems that are known before any download, one sentence each; writes nothing and imports no torch."""
        return []

    @classmethod
    def count_classes(cls, dataroot: Path) -> int | None:
        """The number of classes; None where the files decide it and are missing."""
        return cls.num_classes


def _file_size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except PermissionError:  # a folder of other people
        raise
    except OSError:
        return -1


def read_image(file: str | Path | Any, name: str | Path | None = None, *, upright: bool = True) -> Image.Image:
    """An image file (path or binary file object) as RGB; BadImageError calls it ``name`` or its path.

    With ``upright`` it is turned as its EXIF orientation tells.
    """
    try:
        with Image.open(file, formats=IMAGE_FORMATS) as image:
            image.load()
            image = as_rgb(image)
            if upright:
                ImageOps.exif_transpose(image, in_place=True)
            return image
    except Exception as error:  # on damaged files Pillow's readers raise nearly anything
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        if isinstance(error, Image.UnidentifiedImageError):
            reason = f"it is empty or not an image in one of {', '.join(IMAGE_FORMATS)}"
        raise BadImageError(file if name is None else name, reason) from error


def as_rgb(image: Image.Image) -> Image.Image:
    """A loaded image of any mode as RGB; one that already is comes back itself."""
    if image.mode.startswith("I"):  # 16-bit or 32-bit grey, which Pillow's own conversion clips at 255
        values = np.asarray(image).astype(np.int64)
        if image.mode != "I" or values.max(initial=0) > 255:
            values = (values.clip(0, 65535) * 255 + 32767) // 65535
        image = Image.fromarray(values.clip(0).astype(np.uint8))
    elif image.mode == "La" or image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        image = image.convert("LA" if image.mode == "La" else "RGBA")  # there is no (silent) way to RGB from these
    return image if image.mode == "RGB" else image.convert("RGB")


def seeded_split(labels: np.ndarray, fraction: float, rng: np.random.RandomState) -> np.ndarray:
    """Choose round(fraction * n) images of labels int [n] at random (bool [n]), the same share of every class.

    Shares that are not whole are rounded so that the total is exact; at least one image of a class is not chosen.
    """
    chosen = np.zeros(len(labels), dtype=bool)
    classes, counts = np.unique(labels, return_counts=True)
    exact = counts * fraction
    share = np.minimum(np.floor(exact).astype(np.int64), counts - 1)
    missing = int(round(len(labels) * fraction)) - int(share.sum())
    for position in np.argsort(-(exact - share), kind="stable"):
        if missing > 0 and share[position] < counts[position] - 1:
            share[position] += 1
            missing -= 1
    for label, number in zip(classes, share, strict=True):
        members = np.flatnonzero(labels == label)
        chosen[rng.permutation(members)[:number]] = True
    return chosen


def random_state(seed: int, *purpose: int | str) -> np.random.RandomState:
    """Numpy's frozen generator for one purpose of a run; its stream is the same in every numpy version."""
    from utils.seed import derive_seed  # imports torch

    return np.random.RandomState(derive_seed(seed, *purpose) % 2**32)
