"""L2P by hand."""

import math

import pytest
import torch

from models.prompts.base import PromptDims
from models.prompts.l2p import L2P

DIMS = PromptDims(query_dim=2, embed_dim=4, depth=6, num_tasks=3)


def build(pool: int = 8, deep: bool = False) -> L2P:
    """Key m is at m * 20 degrees."""
    torch.manual_seed(0)
    built = L2P(pool=pool, length=6, deep=deep, dims=DIMS)
    angles = torch.arange(pool) * math.radians(20)
    with torch.no_grad():
        built.e_k_0.copy_(torch.stack([angles.cos(), angles.sin()], dim=1) * 3)
    return built


@pytest.mark.parametrize("training", [True, False])
def test_halves_of_the_five_best_are_concatenated(training):
    """A query at 1 degree is next to keys 0, 1, 2, 3, 4, in this order."""
    pool = build().train(training)
    query = torch.tensor([[math.cos(math.radians(1)), math.sin(math.radians(1))]])
    key, value = pool(query).layers[0].prefix
    assert torch.equal(key, torch.cat([pool.e_p_0[m, :3] for m in range(5)])[None])
    assert torch.equal(value, torch.cat([pool.e_p_0[m, 3:] for m in range(5)])[None])


def test_loss_by_hand():
    query = torch.tensor([[1.0, 0.0]])
    expected = sum(1 - math.cos(math.radians(20 * m)) for m in range(5))
    torch.testing.assert_close(build().train()(query).loss, torch.tensor(expected))
    torch.testing.assert_close(build().train()(query.repeat(3, 1)).loss, torch.tensor(expected))
    assert build().eval()(query).loss == 0


@pytest.mark.parametrize(("deep", "blocks"), [(False, 1), (True, 5)])
def test_depth(deep, blocks):
    pool = build(deep=deep)
    layers = pool(torch.randn(1, 2)).layers
    assert [layer.prefix is not None for layer in layers] == [True] * blocks + [False] * (6 - blocks)
    assert len(list(pool.parameters())) == 2 * blocks
