"""A look at all images of a data set before a run (``run.py --check_data``)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
from tqdm import tqdm

from dataloaders.base import BadImageError, ImageStore
from dataloaders.tasks import Images, TaskStream


def check_stream(
    stream: TaskStream, dataset: str, *, threads: int | None = None, progress: bool = True
) -> dict[str, Any]:
    """Read every image that a run would use.

    Args:
        dataset: the name of the data set, for the report.
        threads: how many read at a time; as many as there are processors when left out.
        progress: whether to show a progress bar.

    Returns:
        ``dataset``; ``num_classes``; ``split`` (``authors``, ``official``, ``seeded`` or ``folder``);
        ``train`` and ``test``, numbers of images; ``tasks``, for each ``train``, ``test`` and ``classes``
        (names in label order); ``bad``, missing or damaged images relative to dataroot, sorted: none when the
        data are fine.
    """
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
        "bad": _bad_images(parts, threads or os.cpu_count() or 1, progress),
    }


def _bad_images(parts: Sequence[Images], threads: int, progress: bool) -> list[str]:
    """Names of the images that cannot be read, sorted. Threads do: Pillow decodes outside Python's lock."""
    bad: set[str] = set()
    total = sum(len(part.used) for part in parts)
    with (
        ThreadPoolExecutor(threads) as pool,
        tqdm(total=total, desc="reading images", unit="image", disable=None if progress else True, leave=False) as bar,
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
