"""CODA-Prompt by hand; tests/test_golden.py checks prompts and growth against recorded values."""

import pytest
import torch

from models.prompts.base import PromptDims
from models.prompts.coda import CODAPrompt, gram_schmidt_growth, orthogonality
from utils.config import ConfigError

DIMS = PromptDims(query_dim=12, embed_dim=16, depth=6, num_tasks=3)


def build(pool: int = 7, ortho_weight: float = 0.0) -> CODAPrompt:
    torch.manual_seed(0)
    return CODAPrompt(pool=pool, length=4, ortho_weight=ortho_weight, dims=DIMS)


def test_growth_changes_the_components_of_the_task_only():
    pool = build()
    assert not pool.e_k_0[2:].any()  # nothing past the first task's components
    with torch.no_grad():
        pool.e_k_0[:2].mul_(3).add_(0.1)  # learned: neither orthogonal nor of unit length
    before = pool.e_k_0.detach().clone()
    pool.begin_task(1, torch.Generator().manual_seed(1))
    assert torch.equal(pool.e_k_0[:2], before[:2])
    assert not pool.e_k_0[4:].any()
    torch.testing.assert_close(pool.e_k_0[2:4].norm(dim=1), torch.ones(2))


def test_a_dead_component_is_an_error():
    before = torch.zeros(4, 5)
    before[0, 0] = 1.0
    with pytest.raises(ConfigError, match="component 1 of the prompt pool has become zero"):
        gram_schmidt_growth(before, torch.randn(2, 5), start=2)


def test_orthogonality_by_hand():
    assert orthogonality(torch.tensor([[1.0, 0.0], [1.0, 0.0]])) == 0.5  # X X^T - I = [[0, 1], [1, 0]]
    assert orthogonality(torch.eye(3)) == 0


def test_penalty_is_of_used_components_in_training_only():
    pool = build(ortho_weight=0.5)
    with torch.no_grad():
        for parameter in pool.parameters():
            parameter.mul_(2)  # orthogonal with squared norm 4: each penalty is 9 * 2 / 4
    pool.train()
    torch.testing.assert_close(pool(torch.randn(1, 12)).loss, torch.tensor(0.5 * 5 * 3 * 4.5))
    assert pool.eval()(torch.randn(1, 12)).loss == 0
    assert build().train()(torch.randn(1, 12)).loss == 0
