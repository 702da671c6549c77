"""Optimizers and the schedules of the paper's configurations."""

import math

import pytest
import torch

from learners.optim import build_optimizer, learning_rate
from utils.config import OptimConfig


def parameter() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.ones(3))


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        ("Adam", torch.optim.Adam, {"betas": (0.8, 0.999), "weight_decay": 0.1, "amsgrad": False}),
        ("amsgrad", torch.optim.Adam, {"betas": (0.8, 0.999), "weight_decay": 0.1, "amsgrad": True}),
        ("SGD", torch.optim.SGD, {"momentum": 0.8, "weight_decay": 0.1}),
        ("RMSprop", torch.optim.RMSprop, {"momentum": 0.8, "weight_decay": 0.1}),
        ("Rprop", torch.optim.Rprop, {}),
    ],
)
def test_optimizers(name, kind, expected):
    optimizer = build_optimizer([parameter()], OptimConfig(optimizer=name, lr=0.01, momentum=0.8, weight_decay=0.1))
    assert type(optimizer) is kind
    group = optimizer.param_groups[0]
    assert group["lr"] == 0.01
    assert {key: group[key] for key in expected} == expected


def test_cosine_with_the_originals_lag():
    """Epochs 0 and 1 run at lr; the last of K at lr * cos(99 pi (K - 2) / (200 (K - 1)))."""
    config = OptimConfig(lr=1.0, schedule=(20,))
    rates = [learning_rate(config, epoch) for epoch in range(config.epochs)]
    assert rates[0] == rates[1] == 1.0
    for epoch in range(2, 20):
        assert rates[epoch] == pytest.approx(math.cos(99 * math.pi * (epoch - 1) / (200 * 19)))
    assert rates[19] == pytest.approx(0.0974, abs=1e-4)
    assert all(a > b for a, b in zip(rates[1:], rates[2:], strict=False))
    for epochs in (1, 2):
        short = OptimConfig(lr=0.5, schedule=(epochs,))
        assert [learning_rate(short, epoch) for epoch in range(epochs)] == [0.5] * epochs


def test_decay_is_multi_step():
    config = OptimConfig(lr=1.0, schedule_type="decay", schedule=(2, 4, 6))
    optimizer = torch.optim.SGD([parameter()], lr=1.0)
    reference = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 4, 6], gamma=0.1)
    for epoch in range(config.epochs):
        expected = reference.get_last_lr()[0]
        assert learning_rate(config, epoch) == pytest.approx(expected)
        optimizer.step()
        reference.step()
