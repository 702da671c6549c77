"""From the settings of a run to the stream of its tasks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from dataloaders import DATASETS
from dataloaders.tasks import TaskStream
from dataloaders.transforms import EvalTransform, TrainTransform


def build_stream(
    *,
    dataset: str,
    dataroot: str | Path,
    image_size: int,
    first_split_size: int,
    other_split_size: int,
    class_order: Literal["natural", "shuffled"] = "natural",
    seed: int = 0,
    validation: bool = False,
    upper_bound: bool = False,
    memory: int = 0,
    train_aug: bool = True,
    crop_scale: Sequence[float] = (0.08, 1.0),
    data_url: str | None = None,
    log_dir: str | Path | None = None,
    progress: bool = True,
) -> TaskStream:
    """Find (or download) a data set and cut it into tasks.

    Args:
        dataset: a name of :data:`dataloaders.DATASETS`.
        image_size: edge of the model's input in pixels.
        train_aug: augment training images; otherwise they get the test transform.
        crop_scale: range of the random crop's share of the image's area.
        log_dir: where a split that had to be drawn is written, and found again on resume.

    The others are as for :class:`dataloaders.tasks.TaskStream` and :class:`dataloaders.base.ImageSource`.

    Raises:
        DataError: files are missing, or not what they should be.
    """
    source = DATASETS.load(dataset)(
        Path(dataroot),
        data_url=data_url,
        seed=seed,
        log_dir=None if log_dir is None else Path(log_dir),
        progress=progress,
    )
    test_transform = EvalTransform(image_size, source.test_crop)
    return TaskStream(
        source.load(train=True),
        None if validation else source.load(train=False),
        class_names=source.class_names,
        split=source.split,
        first_split_size=first_split_size,
        other_split_size=other_split_size,
        train_transform=TrainTransform(image_size, crop_scale) if train_aug else test_transform,
        test_transform=test_transform,
        class_order=class_order,
        seed=seed,
        validation=validation,
        upper_bound=upper_bound,
        memory=memory,
    )
