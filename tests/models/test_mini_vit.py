"""The shipped mini_vit_* and their weights."""

import pytest
import torch

from dataloaders.transforms import to_unit
from experiments.pretrain_mini_vit import Images, load_icon_r, nearest_mean
from models.backbones import load_backbone
from models.mini_vit import WEIGHTS_DIR
from models.sizes import OWN_MODELS, known_size


@pytest.mark.parametrize("name", OWN_MODELS)
def test_weights_are_the_documented_ones_and_beat_raw_pixels_on_novel_classes(name):
    """Untrained transformers do worse than pixels here, so only pre-training can win."""
    backbone = load_backbone(name)
    vit = backbone.vit
    assert backbone.tag == name and (vit.depth, vit.image_size, vit.num_tokens) == known_size(name)
    assert backbone.sha256 in (WEIGHTS_DIR / "README.md").read_text(encoding="utf-8")
    features, pixels = [], []
    for data in map(load_icon_r, (True, False)):
        part = data.select(data.labels < 20)
        images = to_unit(part.images)
        with torch.no_grad():
            features.append(Images(vit(vit.embed(images)).cls, part.labels))
        pixels.append(Images(torch.nn.functional.adaptive_avg_pool2d(images, 16).flatten(1), part.labels))
    assert nearest_mean(*features) > nearest_mean(*pixels) + 5
