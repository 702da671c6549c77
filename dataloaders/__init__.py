"""Data sets, their split into tasks, and the loader.

The table below is all that a new data set needs besides its own file. Reading it imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from utils.registry import Entry, Registry


@dataclass(frozen=True)
class DataEntry(Entry):
    """A data set of the table.

    Attributes:
        num_classes: how many classes it has; None when the files decide (see
            :func:`dataloaders.preflight.count_classes`).
        needs_dataroot: whether its files are looked for in ``dataroot``; False for what the project ships.
    """

    num_classes: int | None = None
    needs_dataroot: bool = True


DATASETS: Registry[DataEntry] = Registry(
    "data set",
    {
        "CIFAR100": DataEntry(
            "dataloaders.cifar:CIFAR100",
            about="60,000 32x32 photographs; downloads itself",
            num_classes=100,
        ),
        "CIFAR10": DataEntry(
            "dataloaders.cifar:CIFAR10",
            about="60,000 32x32 photographs; downloads itself",
            num_classes=10,
        ),
        "ImageNet_R": DataEntry(
            "dataloaders.imagenet_r:ImageNetR",
            about="30,000 renditions of 200 ImageNet classes; folder imagenet-r in dataroot",
            num_classes=200,
        ),
        "ImageNet_A": DataEntry(
            "dataloaders.imagenet_a:ImageNetA",
            about="7,500 hard photographs of 200 ImageNet classes; folder imagenet-a in dataroot",
            num_classes=200,
        ),
        "DomainNet": DataEntry(
            "dataloaders.domainnet:DomainNet",
            about="600,000 images of 345 classes in six domains; folder domainnet in dataroot",
            num_classes=345,
        ),
        "ImageFolder": DataEntry(
            "dataloaders.image_folder:ImageFolder",
            about="any folder dataroot/<class>/* or dataroot/{train,val}/<class>/*",
        ),
        "Emoji_R": DataEntry(
            "dataloaders.emoji_r:EmojiR",
            about="1,819 renditions of 200 emoji by different artists; shipped with the project",
            num_classes=200,
            needs_dataroot=False,
        ),
    },
)
