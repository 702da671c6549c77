"""Data sets, their split into tasks, and the loader.

The table below is all that a new data set needs besides its own file. Reading it imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from utils.config import DataConfig
from utils.registry import Entry, Registry


@dataclass(frozen=True)
class DataEntry(Entry):
    """A data set, a :class:`dataloaders.base.DataSource`; ``num_classes`` is None where the files decide it."""

    num_classes: int | None = None

    def count_classes(self, dataroot: Path) -> int | None:
        """The number of classes; None where the files decide it and are missing."""
        return self.load().count_classes(dataroot) if self.num_classes is None else self.num_classes

    def missing(self, config: DataConfig) -> list[str]:
        """Problems that are known before any download, one sentence each; writes nothing and imports no torch."""
        problems = []
        if config.data_url is not None and urlsplit(config.data_url).scheme not in ("http", "https", "file"):
            problems.append(f"--data_url {config.data_url}: not an http(s):// or file:// address")
        return problems + self.load().missing(config)


DATASETS: Registry[DataEntry] = Registry(
    "data set",
    {
        "CIFAR100": DataEntry("dataloaders.cifar:CIFAR100", "60,000 32x32 photographs; downloads itself", 100),
        "CIFAR10": DataEntry("dataloaders.cifar:CIFAR10", "60,000 32x32 photographs; downloads itself", 10),
        "ImageNet_R": DataEntry(
            "dataloaders.imagenet_r:ImageNetR",
            "30,000 renditions of 200 ImageNet classes; folder imagenet-r in dataroot",
            200,
        ),
        "ImageNet_A": DataEntry(
            "dataloaders.imagenet_a:ImageNetA",
            "7,500 hard photographs of 200 ImageNet classes; folder imagenet-a in dataroot",
            200,
        ),
        "DomainNet": DataEntry(
            "dataloaders.domainnet:DomainNet", "600,000 images of 345 classes in six domains; folder domainnet", 345
        ),
        "ImageFolder": DataEntry(
            "dataloaders.image_folder:ImageFolder", "any folder dataroot/<class>/* or dataroot/{train,val}/<class>/*"
        ),
        "Emoji_R": DataEntry(
            "dataloaders.emoji_r:EmojiR", "1,819 renditions of 200 emoji by different artists; shipped here", 200
        ),
    },
)
