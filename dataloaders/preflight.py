"""What can be said about a run's data before anything is downloaded. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

from dataloaders import DATASETS


def count_classes(dataset: str, dataroot: str | Path) -> int | None:
    """The number of classes of a data set; None when its files decide it and are missing."""
    entry = DATASETS[dataset]
    if entry.num_classes is not None:
        return entry.num_classes
    return entry.load().count_classes(Path(dataroot))


def preflight(dataset: str, dataroot: str | Path, data_url: str | None = None) -> list[str]:
    """Problems that a run would meet later, one sentence each; writes nothing and downloads nothing."""
    problems = []
    if data_url is not None and urlsplit(data_url).scheme not in ("http", "https", "file"):
        problems.append(f"--data_url {data_url}: not an http(s):// or file:// address")
    return problems + DATASETS.load(dataset).preflight(Path(dataroot), data_url)
