"""DualPrompt by hand."""

import torch

from models.prompts.base import PromptDims
from models.prompts.dualprompt import DualPrompt

DIMS = PromptDims(query_dim=2, embed_dim=4, depth=6, num_tasks=3)


def build(pool: int = 3) -> DualPrompt:
    torch.manual_seed(0)
    built = DualPrompt(pool=pool, e_length=6, g_length=4, dims=DIMS)
    with torch.no_grad():
        for layer in (2, 3, 4):
            getattr(built, f"e_k_{layer}")[:3] = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    return built


def test_training_uses_the_entry_of_the_task():
    pool = build().train()
    pool.task = 1
    key, value = pool(torch.tensor([[1.0, 0.0], [0.0, 1.0]])).layers[2].prefix
    assert torch.equal(torch.cat([key, value], dim=1), pool.e_p_2[1:2])


def test_loss_by_hand():
    """Cosines with the key (0, 2): 0 and 0.8, so 1 - cos is 1 and 0.2 on each of three blocks."""
    pool = build().train()
    pool.task = 1
    loss = pool(torch.tensor([[1.0, 0.0], [3.0, 4.0]])).loss
    torch.testing.assert_close(loss, torch.tensor(3 * 0.6))


def test_evaluation_uses_the_best_key_whatever_the_task():
    pool = build().eval()
    query = torch.tensor([[1.0, 0.1], [0.1, 1.0], [1.0, 0.9]])
    for pool.task in range(3):
        key, value = pool(query).layers[3].prefix
        assert torch.equal(torch.cat([key, value], dim=1), pool.e_p_3[[0, 1, 2]])
    assert pool.usage(query)["block 3"].tolist() == [1, 1, 1]


def test_only_the_entry_of_the_task_is_trained():
    pool = build().train()
    pool.task = 2
    layers, loss = pool(torch.randn(4, 2))
    (sum(part.sum() for layer in layers[:5] for part in layer.prefix) + loss).backward()
    assert pool.e_p_2.grad.flatten(1).any(dim=1).tolist() == [False, False, True]
    assert pool.e_k_2.grad.any(dim=1).tolist() == [False, False, True]
