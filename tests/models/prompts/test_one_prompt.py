"""OnePrompt: the same prompts for all images, in evaluation as in training."""

import torch

from models.prompts.base import PromptDims
from models.prompts.one_prompt import OnePrompt


def test_first_half_is_keys_on_five_blocks():
    pool = OnePrompt(length=4, dims=PromptDims(query_dim=12, embed_dim=16, depth=7, num_tasks=2))
    layers, loss = pool(None)
    assert loss is None and [layer.prefix is not None for layer in layers] == [True] * 5 + [False] * 2
    assert torch.equal(layers[4].prefix.key[0], pool.g_p_4[:2]) and torch.equal(
        layers[4].prefix.value[0], pool.g_p_4[2:]
    )
    assert torch.equal(pool.eval()(None).layers[4].prefix.key, layers[4].prefix.key)
