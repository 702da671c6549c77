"""The contract of all entries of the PROMPTS table; a new pool is tested without a new line here."""

import re

import pytest
import torch

from models.prompts import PROMPTS
from models.prompts.base import PromptDims, PromptPool
from models.vit import LayerPrompt
from utils.config import Config

TASKS = 3
BATCH = 4
# Smaller than the paper's pools, where these do not fit 3 tasks of a narrow ViT.
SMALL = {"CODAPrompt": (7, 4, 0.1)}
# The pools of the original, whose checkpoints have these names.
ORIGINAL = ("CODAPrompt", "DualPrompt", "L2P")
NAME = re.compile(r"[eg]_[pka]_\d+")


def build(name: str, depth: int = 12, width: int = 16) -> PromptPool:
    torch.manual_seed(0)
    dims = PromptDims(query_dim=12, embed_dim=width, depth=depth, num_tasks=TASKS)
    return PROMPTS[name].build(Config(prompt_param=SMALL.get(name, PROMPTS[name].paper)), dims)


def query() -> torch.Tensor:
    return torch.randn(BATCH, 12, generator=torch.Generator().manual_seed(1))


def select(pool: PromptPool, asked: torch.Tensor) -> tuple[list[LayerPrompt], torch.Tensor]:
    """What a pool selects for queries [B, 12], and its loss."""
    layers, loss = pool(asked if pool.needs_query else None)
    return layers, torch.zeros(()) if loss is None else loss


def tensors_of(layers: list[LayerPrompt]) -> list[torch.Tensor]:
    return [part for layer in layers for kv in layer if kv is not None for part in kv]


@pytest.mark.parametrize("depth", [1, 3, 12, 24])
@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("training", [True, False])
def test_shapes_and_names_at_every_depth(name, depth, training):
    pool = build(name, depth).train(training)
    for parameter in pool.state_dict() if name in ORIGINAL else ():
        assert NAME.fullmatch(parameter) and int(parameter.rsplit("_", 1)[1]) < depth
    layers, loss = select(pool, query())
    assert len(layers) == depth
    assert loss.shape == () and loss.isfinite()
    assert bool(tensors_of(layers)) == bool(pool.state_dict())
    for layer in layers:
        assert layer.suffix is None
        assert layer.cls_add is None or layer.cls_add.key.shape[1] == 1
        for key, value in (kv for kv in layer if kv is not None):
            assert key.shape == value.shape
            assert key.dim() == 3 and key.shape[0] in (1, BATCH) and key.shape[2] == 16
    assert all(x.isfinite().all() for x in tensors_of(layers))


@pytest.mark.parametrize("name", PROMPTS)
def test_gradients_reach_every_parameter_and_nothing_else(name):
    pool = build(name).train()
    asked = query().requires_grad_()
    layers, loss = select(pool, asked.detach())
    objective = sum(x.square().sum() for x in tensors_of(layers)) + loss
    assert objective.requires_grad == bool(list(pool.parameters()))
    if objective.requires_grad:
        objective.backward()
    assert asked.grad is None
    for parameter_name, parameter in pool.named_parameters():
        assert parameter.requires_grad
        assert parameter.grad is not None and parameter.grad.any(), parameter_name
        assert parameter.grad.isfinite().all()


@pytest.mark.parametrize("name", PROMPTS)
def test_several_threads_add_up_gradients_in_a_fixed_order(name):
    pool = build(name, width=256).train()
    if not list(pool.parameters()):
        return
    queries = torch.randn(16, 12, generator=torch.Generator().manual_seed(1))
    threads, gradients = torch.get_num_threads(), set()
    torch.set_num_threads(2)
    for _ in range(20):
        pool.zero_grad()
        layers, loss = select(pool, queries)
        # Factors differ by image, so that the order of the sums matters.
        (sum((x * queries[:, :1, None]).sum() for x in tensors_of(layers)) + loss).backward()
        gradients.add(b"".join(parameter.grad.numpy().tobytes() for parameter in pool.parameters()))
    torch.set_num_threads(threads)
    assert len(gradients) == 1


@pytest.mark.parametrize("name", PROMPTS)
def test_begin_task_changes_parameters_in_place(name):
    pool = build(name)
    before = {key: (id(value), value.data_ptr()) for key, value in pool.named_parameters()}
    for task in range(1, TASKS):
        pool.begin_task(task, torch.Generator().manual_seed(task))
        assert pool.task == task
    assert before == {key: (id(value), value.data_ptr()) for key, value in pool.named_parameters()}
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in pool.parameters())


@pytest.mark.parametrize("name", PROMPTS)
def test_begin_task_depends_on_the_generator_alone(name):
    first, second = build(name), build(name)
    for seed, pool in enumerate((first, second)):
        torch.manual_seed(seed)
        pool.begin_task(1, torch.Generator().manual_seed(3))
    assert all(torch.equal(x, second.state_dict()[key]) for key, x in first.state_dict().items())


@pytest.mark.parametrize("name", PROMPTS)
def test_images_do_not_influence_each_other(name):
    pool = build(name).eval()
    whole = tensors_of(select(pool, query())[0])
    single = tensors_of(select(pool, query()[2:3])[0])
    for one, other in zip(whole, single, strict=True):
        torch.testing.assert_close(one.expand(BATCH, -1, -1)[2:3], other)


@pytest.mark.parametrize("name", PROMPTS)
def test_usage_counts_entries_per_block(name):
    pool = build(name).eval()
    usage = pool.usage(query())
    assert all(re.fullmatch(r"block \d+", layer) for layer in usage)
    halves = [pool.usage(half) for half in query().chunk(2)]
    for layer, counts in usage.items():
        assert counts.dim() == 1 and counts.isfinite().all()
        torch.testing.assert_close(counts, sum(half[layer] for half in halves))
