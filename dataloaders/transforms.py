"""The paper's augmentation and test transform on Pillow images; no mean/std normalisation follows."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2

from dataloaders.base import TestCrop


class TrainTransform(v2.Compose):
    """A random crop of a share ``crop_scale`` of the area, resized to [size, size], and a flip with probability 1/2."""

    def __init__(self, size: int, crop_scale: Sequence[float] = (0.08, 1.0)) -> None:
        super().__init__([v2.RandomResizedCrop(size, scale=tuple(crop_scale)), v2.RandomHorizontalFlip()])


class EvalTransform(v2.Compose):
    """The test transform to [size, size]; for ``crop`` see :attr:`dataloaders.base.DataSource.test_crop`."""

    def __init__(self, size: int, crop: TestCrop = "center_crop") -> None:
        steps = [v2.Resize((size, size))] if crop == "stretch" else [v2.Resize(size * 256 // 224), v2.CenterCrop(size)]
        super().__init__(steps)
        self.crop = crop


def to_planes(image: Image.Image, planes: np.ndarray) -> None:
    """Write an RGB image [H, W] into ``planes``, uint8 [3, H, W]."""
    if planes.shape[2] < 128:
        planes[:] = np.asarray(image).transpose(2, 0, 1)
        return
    for plane, band in zip(planes, image.split(), strict=True):  # faster for large images
        plane.reshape(-1)[:] = np.frombuffer(band.tobytes(), np.uint8)


def to_unit(images: torch.Tensor) -> torch.Tensor:
    """uint8 -> float32 in [0, 1], bit for bit as torchvision's ToTensor, on any device."""
    if images.device.type == "cpu":
        # At 224 px three times as fast as torch, since numpy asks the system for large pages of memory.
        return torch.from_numpy(np.divide(images.numpy(), np.float32(255), dtype=np.float32))
    # The divisor is a tensor because CUDA multiplies by the reciprocal of a Python number instead.
    return images.to(torch.float32).div_(torch.full((), 255.0, device=images.device))
