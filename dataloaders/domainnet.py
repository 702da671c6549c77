"""DomainNet (Peng et al. 2019): the same classes as clip art, paintings, sketches, photographs and more."""

from __future__ import annotations

import logging
from pathlib import Path

from dataloaders.base import DataError
from dataloaders.folders import FileList, FileSource, checked_path, list_classes, split_by_class, subfolders
from utils.config import DataConfig

_log = logging.getLogger(__name__)

DOMAINS = ("clipart", "infograph", "painting", "quickdraw", "real", "sketch")


class DomainNet(FileSource):
    """600,000 images of 345 classes in ``dataroot/domainnet/<domain>/<class>`` (or in ``dataroot`` itself).

    A task holds its classes in all domains that exist. The official lists ``<domain>_train.txt`` and
    ``<domain>_test.txt`` (lines ``<domain>/<class>/<file> <label>``) are used when every domain has both beside its
    folder, and fix the class numbers. Otherwise classes are numbered by name and a fifth of each class and domain,
    drawn with the seed, is for testing.
    """

    name = "DomainNet"
    url = "https://ai.bu.edu/M3SDA/"
    num_classes = 345

    def find(self) -> None:
        base, domains = _domains(self.root)
        prefix = "" if base == self.root else f"{base.name}/"
        lists = [base / f"{domain}_{part}.txt" for part in ("train", "test") for domain in domains]
        missing = [file.name for file in lists if not file.is_file()]
        if not missing:
            self.split = "official"
            files = [_read_list(file, prefix) for file in lists]
            self.train, self.test = sum(files[: len(domains)], []), sum(files[len(domains) :], [])
            self.class_names = self.names_from_paths("the lists <domain>_train.txt and <domain>_test.txt")
            return
        self.split = "seeded"
        _log.warning(f"DomainNet: {', '.join(missing)} missing in {base}; images are split 80/20 with the seed instead")
        self.class_names = sorted({name for domain in domains for name in subfolders(base / domain)})
        self.require_all_classes(range(len(self.class_names)), base)
        self.train, self.test = [], []
        for domain in domains:
            train, test = split_by_class(list_classes(self.root, prefix + domain, self.class_names), self.seed)
            self.train += train
            self.test += test

    @classmethod
    def missing(cls, config: DataConfig) -> list[str]:
        if _domains(config.dataroot)[1]:
            return []
        return [
            f"dataset DomainNet: none of the folders {', '.join(DOMAINS)} in {config.dataroot / 'domainnet'}; get the "
            f"cleaned version from {cls.url} and unpack it there, with the lists <domain>_train.txt and "
            "<domain>_test.txt"
        ]


def _domains(root: Path) -> tuple[Path, list[str]]:
    """The folder that holds the domains, and the domains in it."""
    base = next((root / name for name in ("domainnet", "DomainNet") if (root / name).is_dir()), root)
    return base, [domain for domain in DOMAINS if (base / domain).is_dir()]


def _read_list(file: Path, prefix: str) -> FileList:
    """The images in an official list, whose paths continue ``prefix``; a wrong line is a :class:`DataError`."""
    files = []
    for number, line in enumerate(file.read_text(encoding="utf-8", errors="surrogateescape").splitlines(), start=1):
        if not line.strip():
            continue
        path, _, label = line.strip().rpartition(" ")
        try:
            files.append((prefix + checked_path(path), int(label)))
        except ValueError as error:
            raise DataError(f"{file}, line {number}: expected <domain>/<class>/<file> <label>") from error
    return files
