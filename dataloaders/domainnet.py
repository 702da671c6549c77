"""DomainNet (Peng et al. 2019): the same classes as clip art, paintings, sketches, photographs and more."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np

from dataloaders.base import DataError, FileStore, ImageSource
from dataloaders.folders import LabelledFiles, subfolders

_log = logging.getLogger(__name__)

NUM_CLASSES = 345
DOMAINS = ("clipart", "infograph", "painting", "quickdraw", "real", "sketch")
PAGE_URL = "https://ai.bu.edu/M3SDA/"


class DomainNet(ImageSource):
    """600,000 images of 345 classes in ``dataroot/domainnet/<domain>/<class>`` (or in ``dataroot`` itself).

    The domains that are there are put together; a task holds its classes in all of them. The official lists
    ``<domain>_train.txt`` and ``<domain>_test.txt`` (lines ``<domain>/<class>/<file> <label>``) are used when
    every domain has both beside its folder, and fix the class numbers. Otherwise classes are numbered by name
    and a fifth of each class and domain, drawn with the seed, is for testing.
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
        base = _base(root)
        domains = _domains(base)
        lists = [base / f"{domain}_{part}.txt" for domain in domains for part in ("train", "test")]
        missing = [path.name for path in lists if not path.is_file()]
        prefix = "" if base == root else f"{base.name}/"
        if not missing:
            self.split = "official"
            self._train = _read_lists(base, [f"{domain}_train.txt" for domain in domains], prefix)
            self._test = _read_lists(base, [f"{domain}_test.txt" for domain in domains], prefix)
            self.class_names = _names_in_lists([self._train, self._test])
        else:
            self.split = "seeded"
            _log.warning(
                "DomainNet: %s missing in %s; images are split 80/20 with the seed instead of officially",
                ", ".join(missing),
                base,
            )
            self.class_names = sorted({name for domain in domains for name in subfolders(base / domain)})
            if len(self.class_names) != NUM_CLASSES:
                raise DataError(_wrong_number(len(self.class_names), str(base)))
            parts = [
                LabelledFiles.from_classes(root, prefix + domain, self.class_names).seeded_split(seed)
                for domain in domains
            ]
            self._train, self._test = (LabelledFiles.joined(part) for part in zip(*parts, strict=True))

    def load(self, train: bool) -> tuple[FileStore, np.ndarray]:
        return (self._train if train else self._test).store(self._root)

    @classmethod
    def preflight(cls, root: Path, data_url: str | None = None) -> list[str]:
        if _domains(_base(root)):
            return []
        return [
            f"dataset DomainNet: none of the folders {', '.join(DOMAINS)} in {root / 'domainnet'}; get the "
            f"cleaned version from {PAGE_URL} and unpack it there, with the lists <domain>_train.txt and "
            "<domain>_test.txt"
        ]


def _base(root: Path) -> Path:
    """The folder that holds the domains."""
    for name in ("domainnet", "DomainNet"):
        if (root / name).is_dir():
            return root / name
    return root


def _domains(base: Path) -> list[str]:
    return [domain for domain in DOMAINS if (base / domain).is_dir()]


def _wrong_number(found: int, where: str) -> str:
    return (
        f"dataset DomainNet: {found} classes instead of {NUM_CLASSES} in {where}; unpack it again, or use "
        "dataset: ImageFolder for images of your own"
    )


def _read_lists(base: Path, names: list[str], prefix: str) -> LabelledFiles:
    """The images that official lists name.

    Raises:
        DataError: a line is not ``<domain>/<class>/<file> <label>``.
    """
    paths: list[str] = []
    labels: list[int] = []
    for name in names:
        text = (base / name).read_text(encoding="utf-8", errors="surrogateescape")
        for number, line in enumerate(text.splitlines(), start=1):
            if not line.strip():
                continue
            path, _, label = line.strip().rpartition(" ")
            parts = path.split("/")
            if len(parts) != 3 or "" in parts or ".." in parts or not label.isdecimal():
                raise DataError(f"{base / name}, line {number}: expected <domain>/<class>/<file> <label>")
            paths.append(prefix + path)
            labels.append(int(label))
    return LabelledFiles(paths, labels)


def _names_in_lists(parts: list[LabelledFiles]) -> list[str]:
    """Class names in label order, from the paths' last folders."""
    names: dict[int, str] = {}
    for part in parts:
        for path, label in zip(part.paths, part.labels.tolist(), strict=True):
            names.setdefault(label, path.split("/")[-2])
    if sorted(names) != list(range(NUM_CLASSES)):
        raise DataError(_wrong_number(len(names), "the lists <domain>_train.txt and <domain>_test.txt"))
    return [names[label] for label in range(NUM_CLASSES)]
