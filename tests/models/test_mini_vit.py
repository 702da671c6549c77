"""The shipped mini_vit_* and their weights."""

import numpy as np
import pytest
import torch
from torch import Tensor

from dataloaders.icon_r import IconR
from dataloaders.transforms import to_unit
from models.backbones import load_backbone
from models.mini_vit import weights_path
from models.sizes import OWN_MODELS, known_size
from utils.config import DataConfig


def nearest_mean(train: Tensor, train_labels: np.ndarray, test: Tensor, test_labels: np.ndarray) -> float:
    """Accuracy (%) of the class whose mean training feature has the largest cosine."""
    means = torch.stack([train[train_labels == label].mean(0) for label in range(train_labels.max() + 1)])
    normalize = torch.nn.functional.normalize
    chosen = (normalize(test, dim=1) @ normalize(means, dim=1).T).argmax(1)
    return 100 * np.mean(chosen.numpy() == test_labels)


@pytest.mark.parametrize("name", OWN_MODELS)
def test_weights_are_the_documented_ones_and_beat_raw_pixels_on_novel_classes(name):
    """Untrained transformers do worse than pixels here, so only pre-training can win."""
    backbone, source = load_backbone(name), IconR(DataConfig(), seed=0)
    vit = backbone.vit
    assert backbone.tag == name and (vit.depth, vit.image_size, vit.num_tokens) == known_size(name)
    assert backbone.sha256 in weights_path(name).with_name("README.md").read_text(encoding="utf-8")
    features, pixels = [], []
    for train in (True, False):
        store, labels = source.load(train)
        used = np.flatnonzero(labels < 20)
        images = torch.stack([torch.from_numpy(np.array(store.open(index))) for index in used])
        images = to_unit(images.permute(0, 3, 1, 2))
        with torch.no_grad():
            features += [vit(vit.embed(images)).cls, labels[used]]
        pixels += [torch.nn.functional.adaptive_avg_pool2d(images, 16).flatten(1), labels[used]]
    assert nearest_mean(*features) > nearest_mean(*pixels) + 5
