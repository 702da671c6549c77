"""A look at all images of a data set before a run (``run.py --check_data``)."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from dataloaders.base import BadImageError, ImageStore
from dataloaders.build import build_stream
from dataloaders.tasks import Images


def check_data(*, dataset: str, dataroot: str | Path, workers: int = 0, **settings: Any) -> dict[str, Any]:
    """Read every image that a run would use.

    Args:
        workers: threads that read.
        settings: the other arguments of :func:`dataloaders.build.build_stream`.

    Returns:
        ``dataset``; ``num_classes``; ``split`` (``authors``, ``official``, ``seeded`` or ``folder``);
        ``train`` and ``test``, numbers of images; ``tasks``, for each ``train``, ``test`` and ``classes``
        (names in label order); ``bad``, missing or damaged images relative to dataroot, sorted: none when the
        data are fine.

    Raises:
        DataError: the data set cannot be used at all.
    """
    stream = build_stream(dataset=dataset, dataroot=dataroot, require_files=False, **settings)
    progress = settings.get("progress", True)
    parts = [stream.train_images, stream.test_images]
    return {
        "dataset": dataset,
        "num_classes": stream.num_classes,
        "split": stream.split,
        "train": len(stream.train_images.used),
        "test": len(stream.test_images.used),
        "tasks": [
            {
                "train": stream.train_size(task),
                "test": stream.test_size(task),
                "classes": stream.task_names(task),
            }
            for task in range(len(stream))
        ],
        "bad": _bad_images(parts, max(workers, 1), progress),
    }


def _bad_images(parts: Sequence[Images], threads: int, progress: bool) -> list[str]:
    """Names of the images that cannot be read, sorted. Threads do: Pillow decodes outside Python's lock."""
    bad: set[str] = set()
    total = sum(len(part.used) for part in parts)
    with (
        ThreadPoolExecutor(threads) as pool,
        tqdm(total=total, desc="reading images", unit="image", disable=not progress, leave=False) as bar,
    ):
        for part in parts:
            readable = pool.map(partial(_readable, part.store), part.used)
            for index, good in zip(part.used, readable, strict=True):
                if not good:
                    bad.add(part.store.name(index))
                bar.update()
    return sorted(bad)


def _readable(store: ImageStore, index: np.int64) -> bool:
    try:
        store.open(int(index))
    except BadImageError:
        return False
    return True
