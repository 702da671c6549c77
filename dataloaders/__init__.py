"""Data sets, their split into tasks, and the loader.

The table below is all that a new data set needs besides its own file, a :class:`dataloaders.base.DataSource`. Reading
it imports no torch.
"""

from utils.registry import Entry, Registry

DATASETS: Registry[Entry] = Registry(
    "data set",
    {
        "CIFAR100": Entry("dataloaders.cifar:CIFAR100", "60,000 32x32 photographs; downloaded on demand"),
        "CIFAR10": Entry("dataloaders.cifar:CIFAR10", "60,000 32x32 photographs; downloaded on demand"),
        "ImageNet_R": Entry(
            "dataloaders.imagenet_r:ImageNetR", "30,000 renditions of 200 classes; folder imagenet-r in dataroot"
        ),
        "ImageFolder": Entry(
            "dataloaders.image_folder:ImageFolder", "any folder dataroot/<class>/* or dataroot/{train,val}/<class>/*"
        ),
        "Icon_R": Entry("dataloaders.icon_r:IconR", "11,647 icons of 200 things by different designers; shipped here"),
    },
)
