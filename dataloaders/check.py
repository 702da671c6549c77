"""A look at all images of a data set before a run (``run.py --check_data``)."""

import os
from typing import Any

from tqdm.contrib.concurrent import thread_map

from dataloaders.base import BadImageError, ImageSubset
from dataloaders.tasks import TaskStream


def check_stream(stream: TaskStream, dataset: str) -> dict[str, Any]:
    """Read every image that a run would use, with a progress bar on a terminal.

    Returns:
        ``dataset``; ``num_classes``; ``split`` (``authors``, ``official``, ``seeded`` or ``folder``);
        ``train`` and ``test``, numbers of images; ``tasks``, for each ``train``, ``test`` and ``classes``
        (names in label order); ``bad``, missing or damaged images relative to dataroot, sorted.
    """
    images = [(part, index) for part in (stream.train_images, stream.test_images) for index in part.used.tolist()]
    bar = {"desc": "reading images", "unit": "image", "disable": None, "leave": False}

    def bad_name(image: tuple[ImageSubset, int]) -> str | None:
        part, index = image
        try:
            part.store.open(index)
        except BadImageError:
            return part.store.name(index)

    names = set(thread_map(bad_name, images, max_workers=os.cpu_count(), **bar))  # Pillow decodes without the GIL
    return {
        "dataset": dataset,
        "num_classes": stream.num_classes,
        "split": stream.split,
        "train": len(stream.train_images.used),
        "test": len(stream.test_images.used),
        "tasks": [
            {"train": stream.train_size(task), "test": stream.test_size(task), "classes": stream.task_names(task)}
            for task in range(len(stream))
        ],
        "bad": sorted(names - {None}),
    }
