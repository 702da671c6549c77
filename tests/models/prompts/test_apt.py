"""APT by hand; tests/test_golden.py has the authors' values."""

import pytest
import torch

from models.prompts.apt import APT, UnitHead
from models.prompts.base import PromptDims


@pytest.fixture
def pool() -> APT:
    torch.manual_seed(0)
    return APT(dropout=0.01, ema_coeff=0.75, dims=PromptDims(query_dim=12, embed_dim=16, depth=3, num_tasks=2))


def test_rows_of_a_block_go_to_key_and_value(pool):
    layers, loss = pool.train()(None)
    assert loss is None and len(layers) == 3
    assert torch.equal(layers[1].cls_add.key[0, 0], pool.prompt_tokens[2])
    assert torch.equal(layers[1].cls_add.value[0, 0], pool.prompt_tokens[3])
    assert not any(part.any() for layer in pool.eval()(None).layers for part in layer.cls_add)


def test_tasks_are_merged_into_what_evaluation_uses(pool):
    """The first task counts fully, also where a checkpoint has left something in the average."""
    pool.global_merged_prompt.fill_(5.0)
    for task, value in enumerate((1.0, 3.0)):
        with torch.no_grad():
            pool.prompt_tokens.fill_(value)
            pool.end_task(task)
        assert (pool.prompt_tokens == value).all()
        assert (pool.global_merged_prompt == (1.0, 1.5)[task]).all()


def test_head_by_hand():
    """x = (1, 3) is normed to (-1, 1), a row of (3, 4) to (0.6, 0.8): 0.2, and the bias."""
    head = UnitHead(2, 1)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[3.0, 4.0]]))
        head.bias.fill_(0.5)
        torch.testing.assert_close(head(torch.tensor([[1.0, 3.0]])), torch.tensor([[0.7]]), atol=1e-4, rtol=0)
