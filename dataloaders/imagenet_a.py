"""ImageNet-A (Hendrycks et al. 2021), and the layout that it shares with ImageNet-R."""

from __future__ import annotations

from typing import ClassVar

from dataloaders.folders import FileSource, list_classes, split_by_class, subfolders
from utils.config import DataConfig


class WordNetFolders(FileSource):
    """Images of 200 ImageNet classes in ``dataroot/<folder>/<wnid>``."""

    folder: ClassVar[str]
    example: ClassVar[str]
    num_classes = 200

    def find(self) -> None:
        """Draw a fifth of each class with the seed for testing; classes are numbered by name."""
        self.split = "seeded"
        self.class_names = subfolders(self.root / self.folder)
        self.require_all_classes(range(len(self.class_names)), self.root / self.folder)
        files = list_classes(self.root, self.folder, self.class_names)
        self.train, self.test = split_by_class(files, self.seed)

    @classmethod
    def missing(cls, config: DataConfig) -> list[str]:
        folder = config.dataroot / cls.folder
        if folder.is_dir():
            return []
        return [
            f"dataset {cls.name}: no folder {folder}; get {cls.url} and unpack it into dataroot, so that "
            f"{folder / cls.example} and 199 others like it exist"
        ]


class ImageNetA(WordNetFolders):
    """7,500 photographs of 200 ImageNet classes that a ResNet-50 gets wrong; there is no official split."""

    name = "ImageNet_A"
    url = "https://people.eecs.berkeley.edu/~hendrycks/imagenet-a.tar"
    folder = "imagenet-a"
    example = "n01498041"
