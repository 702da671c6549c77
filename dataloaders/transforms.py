"""The paper's augmentation and test transform, on Pillow images.

They are torchvision's (v2) transforms, taken apart so that nothing is computed twice: the same random
numbers are drawn from torch's generator in the same order and the same Pillow calls are made, so the pixels
are equal, but an image stays uint8 until its batch is converted to [0, 1]. No mean/std normalisation follows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torchvision.transforms.v2 import RandomResizedCrop

from dataloaders.base import TestCrop


class TrainTransform:
    """RandomResizedCrop and a horizontal flip with probability 1/2, drawn from torch's CPU generator.

    Args:
        size: edge of the square output in pixels.
        crop_scale: range of the crop's share of the image's area.
    """

    def __init__(self, size: int, crop_scale: Sequence[float] = (0.08, 1.0)) -> None:
        self.size = size
        self._crop = RandomResizedCrop(size, scale=tuple(crop_scale), antialias=True)

    def __call__(self, image: Image.Image) -> Image.Image:
        """RGB image of any size -> RGB image [size, size]."""
        crop = self._crop.make_params([image])
        left, top = crop["left"], crop["top"]
        image = image.crop((left, top, left + crop["width"], top + crop["height"]))
        image = image.resize((self.size, self.size), Image.Resampling.BILINEAR)
        if torch.rand(1).item() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return image


class EvalTransform:
    """Resize to the input size, or (``center_crop``) the shorter side to 256/224 of it, then cut the centre.

    Args:
        size: edge of the square output in pixels.
        crop: as :attr:`dataloaders.base.ImageSource.test_crop`.
    """

    def __init__(self, size: int, crop: TestCrop = "center_crop") -> None:
        self.size = size
        self.crop = crop

    def __call__(self, image: Image.Image) -> Image.Image:
        """RGB image of any size -> RGB image [size, size]."""
        size = self.size
        if self.crop == "stretch":
            return image.resize((size, size), Image.Resampling.BILINEAR)
        width, height = _scaled(image.size, size * 256 // 224)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        left, top = round((width - size) / 2), round((height - size) / 2)
        return image.crop((left, top, left + size, top + size))


def _scaled(size: tuple[int, int], shorter: int) -> tuple[int, int]:
    """(width, height) after torchvision's Resize(shorter), whose longer side is rounded down."""
    width, height = size
    if width <= height:
        return shorter, int(shorter * height / width)
    return int(shorter * width / height), shorter


def to_unit(images: torch.Tensor) -> torch.Tensor:
    """uint8 -> float32 in [0, 1], bit for bit as torchvision's ToTensor, on any device.

    The divisor is a tensor because CUDA multiplies by the reciprocal of a Python number instead.
    """
    return images.to(torch.float32).div_(torch.tensor(255.0, device=images.device))

