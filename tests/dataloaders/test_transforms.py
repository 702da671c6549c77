"""The transforms give the pixels of torchvision's, and draw the same random numbers."""

import numpy as np
import pytest
import torch
from torchvision import transforms as v1
from torchvision.transforms import v2

from dataloaders.base import open_image, read_image
from dataloaders.transforms import EvalTransform, TrainTransform, to_planes, to_unit
from tests.dataloaders.conftest import picture

SIZES = [(32, 32), (64, 64), (100, 75), (75, 100), (300, 20), (20, 300), (1, 1), (224, 224), (500, 333)]


def as_batch(image) -> torch.Tensor:
    planes = np.empty((3, image.height, image.width), dtype=np.uint8)
    to_planes(image, planes)
    return to_unit(torch.from_numpy(planes))


@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.5, 1.0)])
@pytest.mark.parametrize("size", SIZES)
def test_training_pixels_equal_v1_and_v2_and_leave_the_same_random_state(size, scale):
    first = v1.Compose([v1.RandomResizedCrop(56, scale=scale), v1.RandomHorizontalFlip(), v1.ToTensor()])
    second = v2.Compose(
        [v2.RandomResizedCrop(56, scale=scale, antialias=True), v2.RandomHorizontalFlip(), v1.ToTensor()]
    )
    ours = TrainTransform(56, scale)
    for seed in range(12):
        image = picture(seed, size)
        results, states = [], []
        for transform in (first, second, lambda image: as_batch(ours(image))):
            torch.manual_seed(seed)
            results.append(transform(image))
            states.append(torch.get_rng_state())
        assert torch.equal(results[0], results[2])
        assert torch.equal(results[1], results[2])
        assert torch.equal(states[0], states[2])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("target", [64, 224])
def test_test_pixels_equal_v1(size, target):
    image = picture(3, size)
    shorter = {64: 73, 224: 256}[target]
    theirs = v1.Compose([v1.Resize(shorter), v1.CenterCrop(target), v1.ToTensor()])(image)
    assert torch.equal(theirs, as_batch(EvalTransform(target, "center_crop")(image)))
    stretched = v1.Compose([v1.Resize((target, target)), v1.ToTensor()])(image)
    assert torch.equal(stretched, as_batch(EvalTransform(target, "stretch")(image)))


def test_test_pixels_equal_v1_at_any_size():
    theirs = v1.Compose([v1.Resize(256), v1.CenterCrop(224)])
    ours = EvalTransform(224, "center_crop")
    rng = np.random.default_rng(0)
    shapes = [(400, 599), (400, 600), (400, 601), (200, 300), *rng.integers(180, 800, (60, 2)).tolist()]
    for trial, shape in enumerate(shapes):
        image = picture(trial, tuple(shape))
        assert np.array_equal(theirs(image), ours(image)), image.size


@pytest.mark.parametrize("shape", [(500, 400), (400, 500), (300, 700), (224, 224)])
def test_files_that_are_decoded_in_part_give_the_same_pixels(tmp_path, shape):
    path = str(tmp_path / "x.jpg")
    picture(0, shape).save(path)
    for transform in (EvalTransform(224), EvalTransform(224, "stretch"), EvalTransform(64), TrainTransform(224)):
        for seed in range(3):
            torch.manual_seed(seed)
            expected = transform(read_image(path))
            torch.manual_seed(seed)
            assert np.array_equal(transform(open_image(path)), expected)


def test_an_image_of_the_input_size_passes_stretch_unchanged():
    image = picture(0, (64, 64))
    assert np.array_equal(EvalTransform(64, "stretch")(image), image)


def test_every_byte_becomes_what_to_tensor_makes_of_it():
    values = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    assert torch.equal(to_unit(torch.from_numpy(values)), v1.ToTensor()(values).permute(1, 2, 0))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_converts_bytes_as_the_cpu_does():
    values = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_unit(values.cuda()).cpu(), to_unit(values))
