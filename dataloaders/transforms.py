"""The paper's augmentation and test transform, on Pillow images.

They are torchvision's (v2) transforms, taken apart so that nothing is computed twice: the same random numbers
are drawn from torch's generator in the same order and the same pixels come out, but an image stays uint8 until
its batch is converted to [0, 1]. No mean/std normalisation follows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from dataloaders.base import TestCrop, load_rows

_BILINEAR = Image.Resampling.BILINEAR
_RATIO = (3 / 4, 4 / 3)  # of a random crop's sides
_LOG_RATIO = torch.log(torch.tensor(_RATIO)).tolist()


class TrainTransform:
    """RandomResizedCrop and a horizontal flip with probability 1/2, drawn from torch's CPU generator.

    Args:
        size: edge of the square output in pixels.
        crop_scale: range of the crop's share of the image's area.
    """

    def __init__(self, size: int, crop_scale: Sequence[float] = (0.08, 1.0)) -> None:
        self.size = size
        self.crop_scale = (float(crop_scale[0]), float(crop_scale[1]))

    def __call__(self, image: Image.Image) -> Image.Image:
        """RGB image of any size -> RGB image [size, size]."""
        box = random_crop(*image.size, self.crop_scale)
        # Resizing with ``box=`` instead would also look at the pixels around the crop.
        image = load_rows(image, box[3]).crop(box)
        image = image.resize((self.size, self.size), _BILINEAR)
        if torch.rand(1).item() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return image


def random_crop(width: int, height: int, scale: tuple[float, float]) -> tuple[int, int, int, int]:
    """The crop (left, top, right, bottom) of torchvision's RandomResizedCrop, from the same random numbers.

    It is written out because ``RandomResizedCrop.make_params`` takes as long as all of a small image's pixels.
    """
    draw = torch.empty(1)
    for _ in range(10):
        area = width * height * draw.uniform_(*scale).item()
        ratio = draw.uniform_(*_LOG_RATIO).exp_().item()
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top = torch.randint(0, height - h + 1, (1,)).item()
            left = torch.randint(0, width - w + 1, (1,)).item()
            return left, top, left + w, top + h
    # Ten misses: the largest central crop of a shape that is allowed.
    w, h = width, height
    if width / height < _RATIO[0]:
        h = round(width / _RATIO[0])
    elif width / height > _RATIO[1]:
        w = round(height * _RATIO[1])
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


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
        if self.crop == "stretch":
            return load_rows(image, image.height).resize((self.size, self.size), _BILINEAR)
        return _resize_and_cut(image, self.size * 256 // 224, self.size)


def _resize_and_cut(image: Image.Image, shorter: int, size: int) -> Image.Image:
    """torchvision's Resize(shorter) and CenterCrop(size), computing little of what is cut off.

    Pillow resizes across and then down, except that it may begin with the height of a much taller image. The two
    are done by themselves here, and columns are cut in between.
    """
    width, height = image.size
    # The longer side is rounded down.
    if width <= height:
        new_width, new_height = shorter, int(shorter * height / width)
    else:
        new_width, new_height = int(shorter * width / height), shorter
    left, top = round((new_width - size) / 2), round((new_height - size) / 2)
    if height > 1.5 * width:
        image = load_rows(image, height).resize((new_width, new_height), _BILINEAR)
        return image.crop((left, top, left + size, top + size))

    # Where the scale is a dyadic fraction, a part can be resized by itself to the same pixels: the positions at
    # which Pillow samples are then exact. That holds for the paper's 256.
    exact = shorter & (shorter - 1) == 0
    if exact and new_height == shorter:
        scale = height / shorter
        first, last = top * scale, (top + size) * scale
        start = max(0, math.floor(first - scale) - 2)
        stop = min(height, math.ceil(last + scale) + 2)
        rows = load_rows(image, stop).crop((0, start, width, stop))
        columns = _columns(rows, new_width, left, size)
        return columns.resize((size, size), _BILINEAR, box=(0, first - start, size, last - start))
    image = load_rows(image, height)
    if exact:
        scale = width / shorter
        box = (left * scale, 0, (left + size) * scale, height)
        columns = image.resize((size, height), _BILINEAR, box=box)
    else:
        columns = _columns(image, new_width, left, size)
    return columns.resize((size, new_height), _BILINEAR).crop((0, top, size, top + size))


def _columns(image: Image.Image, width: int, left: int, size: int) -> Image.Image:
    """Resize across to ``width``, then cut ``size`` columns."""
    return image.resize((width, image.height), _BILINEAR).crop((left, 0, left + size, image.height))


def to_planes(image: Image.Image, planes: np.ndarray) -> None:
    """Write an RGB image [H, W] into ``planes``, uint8 [3, H, W]."""
    if planes.shape[2] < 128:
        planes[:] = np.asarray(image).transpose(2, 0, 1)
        return
    # Pillow takes large images apart faster than numpy does.
    for plane, band in zip(planes, image.split(), strict=True):
        plane.reshape(-1)[:] = np.frombuffer(band.tobytes(), np.uint8)


def to_unit(images: torch.Tensor) -> torch.Tensor:
    """uint8 -> float32 in [0, 1], bit for bit as torchvision's ToTensor, on any device.

    The divisor is a tensor because CUDA multiplies by the reciprocal of a Python number instead.
    """
    return images.to(torch.float32).div_(torch.full((), 255.0, device=images.device))
