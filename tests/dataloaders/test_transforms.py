"""The transforms give the pixels of torchvision's first version, and draw the same random numbers."""

import numpy as np
import pytest
import torch
from torchvision import transforms as v1

from dataloaders.transforms import EvalTransform, TrainTransform, to_planes, to_unit
from tests.dataloaders.conftest import picture

SIZES = [(64, 64), (100, 75), (75, 100), (300, 20), (20, 300), (1, 1), (500, 333)]


def as_batch(image) -> torch.Tensor:
    planes = np.empty((3, image.height, image.width), dtype=np.uint8)
    to_planes(image, planes)
    return to_unit(torch.from_numpy(planes))


@pytest.mark.parametrize("size", SIZES)
def test_training_pixels_and_the_random_state(size):
    theirs = v1.Compose([v1.RandomResizedCrop(56, scale=(0.3, 1.0)), v1.RandomHorizontalFlip(), v1.ToTensor()])
    ours = TrainTransform(56, (0.3, 1.0))
    for seed in range(12):
        image = picture(seed, size)
        torch.manual_seed(seed)
        expected, state = theirs(image), torch.get_rng_state()
        torch.manual_seed(seed)
        assert torch.equal(as_batch(ours(image)), expected)
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("target", "shorter"), [(64, 73), (224, 256)])
def test_test_pixels(size, target, shorter):
    image = picture(3, size)
    expected = v1.Compose([v1.Resize(shorter), v1.CenterCrop(target), v1.ToTensor()])(image)
    assert torch.equal(as_batch(EvalTransform(target)(image)), expected)
    expected = v1.Compose([v1.Resize((target, target)), v1.ToTensor()])(image)
    assert torch.equal(as_batch(EvalTransform(target, "stretch")(image)), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_converts_bytes_as_the_cpu_does():
    values = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_unit(values.cuda()).cpu(), to_unit(values))
