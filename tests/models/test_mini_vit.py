"""mini_vit_*: the stem, its folding, the shipped weights and how they were made."""

import hashlib

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from experiments.pretrain_mini_vit import Data, PairSampler, export, extract, load_novel, nearest_mean
from models.mini_vit import fold_batchnorm, mini_vit_base, mini_vit_small, weights_path

BUILDERS = {"mini_vit_base": mini_vit_base, "mini_vit_small": mini_vit_small}


def with_random_norms(model):
    """Give the stem's BatchNorm statistics that are not those of a new one."""
    for module in model.patch_embed.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            torch.nn.init.normal_(module.weight)
            torch.nn.init.normal_(module.bias)
    return model.eval()


def load_into(model, path):
    model.load_state_dict({key: value.float() for key, value in load_file(path).items()})


@pytest.mark.parametrize("name", BUILDERS)
def test_exported_weights_are_folded_and_halved(name, tmp_path):
    torch.manual_seed(0)
    model = with_random_norms(BUILDERS[name](norm=True))
    images = torch.rand(4, 3, 64, 64)
    before, state = extract(model, images), model.state_dict()
    plain = BUILDERS[name]()
    plain.load_state_dict(fold_batchnorm(model).state_dict())
    torch.testing.assert_close(extract(plain, images), before, rtol=1e-4, atol=1e-5)
    export(name, state, tmp_path / "weights.safetensors")
    assert {value.dtype for value in load_file(tmp_path / "weights.safetensors").values()} == {torch.float16}
    load_into(plain, tmp_path / "weights.safetensors")
    assert F.cosine_similarity(extract(plain, images), before).min() > 0.999


@pytest.mark.parametrize("name", BUILDERS)
def test_weights_are_the_documented_ones_and_beat_raw_pixels_on_novel_classes(name):
    """Untrained transformers do worse than pixels here, so only pre-training can win."""
    path = weights_path(name)
    assert hashlib.sha256(path.read_bytes()).hexdigest() in (path.parent / "README.md").read_text(encoding="utf-8")
    model = BUILDERS[name]()
    load_into(model, path)
    features, pixels = [], []
    for part in (load_novel("train"), load_novel("test")):
        images, labels = part.images[part.labels < 80], part.labels[part.labels < 80]
        features.append(Data(extract(model, images), labels))
        pixels.append(Data(F.adaptive_avg_pool2d(images, 16).flatten(1), labels))
    assert nearest_mean(*features) > nearest_mean(*pixels) + 5


def test_pairs_share_a_class_and_classes_do_not_repeat():
    labels = torch.arange(100).repeat_interleave(3)
    for rows in PairSampler(labels):
        first, second = rows.chunk(2)
        assert torch.equal(labels[first], labels[second])
        assert (first != second).all() and len(labels[first].unique()) == len(first) == 64
