"""ImageNet-R (Hendrycks et al. 2021), split as in CODA-Prompt (Smith et al. 2023)."""

from __future__ import annotations

import io
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import yaml

from dataloaders.base import DataError, FileStore, ImageSource
from dataloaders.download import Checksum, fetch, mirrored, write_whole
from dataloaders.folders import LabelledFiles, subfolders

_log = logging.getLogger(__name__)

NUM_CLASSES = 200
SPLITS_DIR = Path(__file__).parent / "splits"
SPLITS_URL = "https://raw.githubusercontent.com/GT-RIPL/CODA-Prompt/main/dataloaders/splits/"
ARCHIVE_URL = "https://people.eecs.berkeley.edu/~hendrycks/imagenet-r.tar"
TRAIN_FILE, TEST_FILE = "imagenet-r_train.yaml", "imagenet-r_test.yaml"
CHECKSUMS = {
    TRAIN_FILE: Checksum("sha256", "6bcaa14ca9359915ac3a44c48ae71388146385686eb15da79a37844421a0b845"),
    TEST_FILE: Checksum("sha256", "57275ac242d68983a4f39ccb81ec34f48b1bd920b9cd79e6e8040d7c042db02a"),
}


class ImageNetR(ImageSource):
    """30,000 renditions (art, cartoons, toys ...) of 200 ImageNet classes, in ``dataroot/imagenet-r/<wnid>``.

    The authors' two split files also fix the class numbers, a shuffle of the wnids, and so which classes form
    which task. They are taken from ``dataloaders/splits``, else from ``dataroot``, else fetched into it. If
    none of that works a split is drawn with the seed and kept in ``log_dir``, where a resumed run finds it.
    """

    folder: ClassVar[str] = "imagenet-r"

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
        drawn = None if log_dir is None else (log_dir / TRAIN_FILE, log_dir / TEST_FILE)
        if drawn is not None and all(path.is_file() for path in drawn):
            self.split = "seeded"
            _log.warning("the split of ImageNet-R is not the paper's but that drawn before, in %s", log_dir)
            self._train, self._test = (_read_split(path) for path in drawn)
        else:
            try:
                paths = [_split_file(name, root, data_url, progress) for name in (TRAIN_FILE, TEST_FILE)]
                self.split = "authors"
                self._train, self._test = (_read_split(path) for path in paths)
            except _NotFetched as error:
                self.split = "seeded"
                self._train, self._test = self._draw(seed, drawn, str(error))
        self.class_names = _class_names([self._train, self._test])

    def load(self, train: bool) -> tuple[FileStore, np.ndarray]:
        return (self._train if train else self._test).store(self._root)

    @classmethod
    def preflight(cls, root: Path, data_url: str | None = None) -> list[str]:
        if (root / cls.folder).is_dir():
            return []
        return [
            f"dataset ImageNet_R: no folder {root / cls.folder}; get {ARCHIVE_URL} and unpack it into "
            f"dataroot, so that {root / cls.folder}/n01443537 and 199 others like it are there"
        ]

    def _draw(
        self, seed: int, targets: tuple[Path, Path] | None, reason: str
    ) -> tuple[LabelledFiles, LabelledFiles]:
        """The fallback: an 80/20 split of what is in the folder; a class is the rank of its wnid."""
        wnids = subfolders(self._root / self.folder)
        if len(wnids) != NUM_CLASSES:
            raise DataError(
                f"{self._root / self.folder} has {len(wnids)} class folders instead of {NUM_CLASSES}: unpack "
                f"{ARCHIVE_URL} again, or use dataset: ImageFolder for images of your own"
            )
        parts = LabelledFiles.from_classes(self._root, self.folder, wnids).seeded_split(seed)
        for path, part in zip(targets or (), parts, strict=bool(targets)):
            content = {"data": [f"data/{name}" for name in part.paths], "targets": part.labels.tolist()}
            dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
            write_whole(path, io.BytesIO(yaml.dump(content, Dumper=dumper).encode()))
        _log.warning(
            "the split of ImageNet-R is not the paper's: its files could not be had (%s). Accuracies cannot "
            "be compared with the paper's. Images are split 80/20 with the seed instead%s. To use the "
            "paper's, put %s and %s from %s into %s and start in a new log_dir",
            reason,
            f" and listed in {targets[0].parent}" if targets else "",
            TRAIN_FILE,
            TEST_FILE,
            SPLITS_URL,
            SPLITS_DIR,
        )
        return parts


class _NotFetched(Exception):
    """A split file is neither here nor to be had."""


def _split_file(name: str, root: Path, data_url: str | None, progress: bool) -> Path:
    """Where the authors' split file is, after fetching it if need be."""
    local = SPLITS_DIR / name
    if local.is_file():
        if not CHECKSUMS[name].matches(local):
            _log.warning("%s is not the authors' file (its SHA-256 differs); it is used as it is", local)
        return local
    target = root / name
    if not CHECKSUMS[name].matches(target):
        try:
            fetch(mirrored(SPLITS_URL + name, data_url), target, CHECKSUMS[name], progress=progress, tries=2)
        except DataError as error:
            raise _NotFetched(str(error)) from error
    return target


def _read_split(path: Path) -> LabelledFiles:
    """A split file: ``data``, a list of ``data/imagenet-r/<wnid>/<file>``, and ``targets``, their classes.

    Raises:
        DataError: it is damaged.
    """
    try:
        # PyYAML's C loader takes 0.3 s, the one in Python ten times as long.
        content: Any = yaml.load(path.read_bytes(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        labels = np.array(content["targets"], dtype=np.int64)
        paths = [_relative(entry) for entry in content["data"]]
        if not 0 < len(paths) == len(labels):
            raise ValueError(f"{len(paths)} images and {len(labels)} targets")
        if labels.min() < 0 or labels.max() >= NUM_CLASSES:
            raise ValueError(f"targets outside 0 to {NUM_CLASSES - 1}")
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"cannot use the split file {path}: {reason}; get it from {SPLITS_URL}") from error
    return LabelledFiles(paths, labels)


def _relative(entry: str) -> str:
    """``data/imagenet-r/<wnid>/<file>``, where ``data`` stands for dataroot, relative to dataroot."""
    parts = entry.split("/")
    if parts[0] == "data":
        parts = parts[1:]
    if len(parts) < 3 or ".." in parts or "" in parts:
        raise ValueError(f"unexpected path {entry}")
    return "/".join(parts)


def _class_names(parts: Sequence[LabelledFiles]) -> list[str]:
    """The wnids in label order, from the paths."""
    names: dict[int, str] = {}
    for part in parts:
        for path, label in zip(part.paths, part.labels.tolist(), strict=True):
            names.setdefault(label, path.split("/")[1])
    missing = [label for label in range(NUM_CLASSES) if label not in names]
    if missing:
        raise DataError(f"the split files of ImageNet-R have no image of class {missing[0]}")
    return [names[label] for label in range(NUM_CLASSES)]
