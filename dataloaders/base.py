"""What a data set is: a source of raw images and labels, which knows files and no tasks.

Nothing here imports torch, so that a configuration can be checked quickly.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from PIL import Image, ImageOps

TestCrop = Literal["stretch", "center_crop"]
SplitKind = Literal["authors", "official", "seeded", "folder"]

# Keys of Image.info under which a file may carry an orientation; without one there is nothing to turn.
_ORIENTATION_KEYS = {"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif", "Raw profile type APP1"}


class DataError(ValueError):
    """Data that cannot be used; one sentence that names the file or value and the way out."""

    @property
    def problems(self) -> list[str]:
        """The same sentence as a list of one, the form in which a configuration's errors are reported."""
        return [str(self)]


class BadImageError(DataError):
    """An image file that is missing, empty or damaged."""

    def __init__(self, path: str | Path, reason: str) -> None:
        # A name that is no UTF-8 must not keep the sentence from being printed.
        shown = f"{path}: {reason}".encode(errors="replace").decode()
        super().__init__(f"cannot read the image {shown}")
        self.path = str(path)
        self.reason = reason

    def __reduce__(self) -> tuple[type[BadImageError], tuple[str, str]]:
        return (BadImageError, (self.path, self.reason))


class ImageStore(ABC):
    """Images by index. Pickles, and holds arrays rather than one Python object per image."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def open(self, index: int) -> Image.Image:
        """Image ``index`` as a Pillow image of mode RGB.

        Raises:
            BadImageError: it is missing, empty or damaged; the message names it.
        """

    def open_lazily(self, index: int) -> Image.Image:
        """The same, but an image that is easily read in part may come undecoded: see :func:`load_rows`."""
        return self.open(index)

    @abstractmethod
    def name(self, index: int) -> str:
        """Where image ``index`` is, relative to ``dataroot``."""

    def missing(self) -> list[str]:
        """Names of the images that are not there."""
        return []


class ImageSource(ABC):
    """The raw files of one data set.

    Making one finds the files, downloading and checking them where the data set can do that.

    Args:
        root: ``dataroot``; everything that is written lies in it.
        data_url: a mirror to download from instead of the official address.
        seed: for the split of data sets that have none.
        log_dir: where such a split is written, and read again on resume; None writes none.
        progress: whether downloads show a progress bar.

    Attributes:
        class_names: names in label order.
        split: where the division into training and test images comes from.
        test_crop: how test images reach the input size: ``stretch`` resizes both sides, ``center_crop``
            resizes the shorter side to 256/224 of the input size and cuts out the centre.

    Raises:
        DataError: the files are missing or not what they should be.
    """

    test_crop: ClassVar[TestCrop] = "center_crop"
    class_names: Sequence[str]
    split: SplitKind

    @abstractmethod
    def __init__(
        self,
        root: Path,
        *,
        data_url: str | None = None,
        seed: int = 0,
        log_dir: Path | None = None,
        progress: bool = True,
    ) -> None: ...

    @abstractmethod
    def load(self, train: bool) -> tuple[ImageStore, np.ndarray]:
        """The training or the test images, and their labels, int64 [n]."""

    @classmethod
    def preflight(cls, root: Path, data_url: str | None = None) -> list[str]:
        """What is known to be missing before any download, one sentence each; writes nothing."""
        return []

    @classmethod
    def count_classes(cls, root: Path) -> int | None:
        """The number of classes where the files decide it; None when they are missing."""
        return None


def as_rgb(image: Image.Image) -> Image.Image:
    """A loaded image of any mode and orientation as upright RGB; one that is so already comes back itself."""
    mode = image.mode
    if mode != "RGB":
        if mode.startswith("I"):
            image = _from_integers(image)
        elif mode == "F":
            image = Image.fromarray(np.clip(np.nan_to_num(np.asarray(image)), 0, 255).astype(np.uint8))
        elif mode == "P" and isinstance(image.info.get("transparency"), bytes):
            image = image.convert("RGBA")
        elif mode in ("La", "RGBa"):
            image = image.convert({"La": "LA", "RGBa": "RGBA"}[mode])
        image = image.convert("RGB")
    if _ORIENTATION_KEYS & image.info.keys():
        image = ImageOps.exif_transpose(image)
    return image


def _from_integers(image: Image.Image) -> Image.Image:
    """A 16-bit (or 32-bit integer) grey image scaled to 8 bits; Pillow's own conversion clips at 255."""
    values = np.asarray(image).astype(np.int64)
    if image.mode == "I" and values.max(initial=0) <= 255:
        return Image.fromarray(values.clip(0).astype(np.uint8))
    return Image.fromarray(((values.clip(0, 65535) * 255 + 32767) // 65535).astype(np.uint8))


def read_image(file: str | Path | Any, name: str | Path | None = None) -> Image.Image:
    """An image file (path or binary file object) as upright RGB.

    Args:
        name: what an error calls it; its path when left out.

    Raises:
        BadImageError: it is missing, empty or damaged.
    """
    name = file if name is None else name
    try:
        with Image.open(file) as image:
            image.load()
            return as_rgb(image)
    # Pillow's readers raise nearly anything on damaged files: OSError, SyntaxError, struct.error, ValueError,
    # KeyError, zlib.error, DecompressionBombError ...
    except Exception as error:
        raise BadImageError(name, _reason(file, error)) from error


def open_image(path: str) -> Image.Image:
    """An image file as upright RGB; an upright RGB JPEG file comes undecoded, for :func:`load_rows`.

    Raises:
        BadImageError: it is missing, empty or damaged.
    """
    try:
        image = Image.open(path)
        if _decodes_from_above(image):
            return image
        with image:
            image.load()
            return as_rgb(image)
    except Exception as error:  # see read_image
        raise BadImageError(path, _reason(path, error)) from error


def load_rows(image: Image.Image, rows: int) -> Image.Image:
    """Decode at least the upper ``rows`` of an image of :func:`open_image`; the others may be black.

    A JPEG file is decoded from above, so that what lies below a crop need not be.

    Raises:
        BadImageError: it is damaged.
    """
    tile = getattr(image, "tile", None)
    if not tile:
        return image
    if rows < image.height:
        image.tile = [tile[0]._replace(extents=(0, 0, image.width, rows))]
    try:
        image.load()
    except Exception as error:  # see read_image
        if rows == image.height:
            raise BadImageError(image.filename, _reason(image.filename, error)) from error
        # Pillow takes the early end for an error. A row that is not black has been decoded, and so have those
        # above it; a black one may never have been.
        if image.crop((0, rows - 1, image.width, rows)).getbbox() is None:
            return read_image(image.filename)
    return image


def _decodes_from_above(image: Image.Image) -> bool:
    """Whether this is an upright RGB JPEG file that is not cut short, which only reading all of it would show."""
    if image.format != "JPEG" or image.mode != "RGB" or len(image.tile) != 1:
        return False
    return not _ORIENTATION_KEYS & image.info.keys() and _ends_with(image.fp, b"\xff\xd9")


def _ends_with(file: Any, end: bytes) -> bool:
    position = file.tell()
    file.seek(-len(end), os.SEEK_END)
    found = file.read(len(end))
    file.seek(position)
    return found == end


def _reason(file: str | Path | Any, error: Exception) -> str:
    """Why an image cannot be read, without the path, which the caller adds."""
    if isinstance(file, (str, os.PathLike)):
        if not os.path.exists(file):
            return "no such file"
        if not os.path.isfile(file):
            return "not a file"
        if os.path.getsize(file) == 0:
            return "the file is empty"
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image that Pillow knows"
    return str(error) or type(error).__name__


class PathArray(Sequence[str]):
    """Paths in two arrays: 30,000 of them take about 1.5 MB and are not copied into forked workers."""

    def __init__(self, paths: Iterable[str]) -> None:
        encoded = [os.fsencode(path) for path in paths]
        self._ends = np.cumsum([len(path) for path in encoded], dtype=np.int64)
        self._bytes = np.frombuffer(b"".join(encoded), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:  # type: ignore[override]
        start = self._ends[index - 1] if index > 0 else 0
        return os.fsdecode(self._bytes[start : self._ends[index]].tobytes())


class FileStore(ImageStore):
    """Image files below a folder, opened when asked for.

    Args:
        root: the folder, ``dataroot``.
        paths: relative to ``root``.
    """

    def __init__(self, root: Path, paths: Iterable[str]) -> None:
        self._root = str(root)
        self._paths = PathArray(paths)

    def __len__(self) -> int:
        return len(self._paths)

    def open(self, index: int) -> Image.Image:
        return read_image(os.path.join(self._root, self._paths[index]))

    def open_lazily(self, index: int) -> Image.Image:
        return open_image(os.path.join(self._root, self._paths[index]))

    def name(self, index: int) -> str:
        return self._paths[index]

    def missing(self) -> list[str]:
        names: dict[str, set[str]] = {}  # a folder is listed once, which is cheaper than a look at each file
        missing = []
        for path in self._paths:
            folder, _, name = path.rpartition("/")
            if folder not in names:
                try:
                    names[folder] = set(os.listdir(os.path.join(self._root, folder)))
                except OSError:
                    names[folder] = set()
            if name not in names[folder]:
                missing.append(path)
        return missing


class ArrayStore(ImageStore):
    """Decoded images in memory.

    Args:
        images: uint8 [n, H, W, 3].
        name: what the images are called in messages; the index is added.
    """

    def __init__(self, images: np.ndarray, name: str) -> None:
        self._images = images
        self._name = name
        self._shared: Any = None

    def __len__(self) -> int:
        return len(self._images)

    def open(self, index: int) -> Image.Image:
        return Image.fromarray(self._images[index])

    def name(self, index: int) -> str:
        return f"{self._name}[{index}]"

    def __getstate__(self) -> dict[str, Any]:
        # A worker that is spawned gets a handle of shared memory instead of a copy: torch's tensors pickle so
        # between processes, numpy's arrays do not. The tensor must outlive the pickling.
        import torch

        if self._shared is None:
            self._shared = torch.from_numpy(self._images).share_memory_()
            self._images = self._shared.numpy()
        return {"name": self._name, "images": self._shared}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["images"].numpy(), state["name"])


def seeded_split(labels: np.ndarray, fraction: float, rng: np.random.RandomState) -> np.ndarray:
    """A random choice of round(fraction * n) images that takes the same share of every class.

    Shares that are not whole are rounded so that the total is exact; a class keeps at least one image out of
    the choice.

    Args:
        labels: int [n].

    Returns:
        bool [n], True for the images chosen.
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
    from utils.seed import derive_seed  # imports torch, which reading the table must not

    return np.random.RandomState(derive_seed(seed, *purpose) % 2**32)
