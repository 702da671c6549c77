"""From the settings of a run to the stream of its tasks."""

from __future__ import annotations

from pathlib import Path

from dataloaders import DATASETS
from dataloaders.tasks import TaskStream
from utils.config import DataConfig


def build_stream(
    config: DataConfig, *, seed: int, image_size: int, resumed_dir: Path | None = None, progress: bool = True
) -> TaskStream:
    """Find or download the data set and split it into tasks of images of ``image_size`` pixels.

    The other arguments are those of :class:`dataloaders.base.DataSource`.

    Raises:
        DataError: files are missing or not what they should be.
    """
    source_class = DATASETS[config.dataset].load()
    source = source_class(config, seed=seed, resumed_dir=resumed_dir, progress=progress)
    return TaskStream(source, config, seed=seed, image_size=image_size)
