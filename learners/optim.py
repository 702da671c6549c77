"""Optimizers and learning-rate schedules of the paper's configurations (SPEC section 6)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import nn


class OptimSettings(NamedTuple):
    """``optimizer``, ``lr``, ``momentum``, ``weight_decay``, ``schedule_type`` and ``schedule``."""

    optimizer: str = "Adam"
    lr: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 0.0
    schedule_type: str = "cosine"
    schedule: Sequence[int] = (20,)

    @property
    def epochs(self) -> int:
        """E, epochs of each phase of each task."""
        return self.schedule[-1]


def build_optimizer(parameters: Iterable[nn.Parameter], settings: OptimSettings) -> torch.optim.Optimizer:
    """A new optimizer for one phase of one task.

    Raises:
        ValueError: the optimizer is unknown.
    """
    parameters = list(parameters)
    lr, momentum, decay = settings.lr, settings.momentum, settings.weight_decay
    match settings.optimizer:
        case "Adam":
            return torch.optim.Adam(parameters, lr=lr, betas=(momentum, 0.999), weight_decay=decay, fused=True)
        case "amsgrad":
            betas = (momentum, 0.999)
            return torch.optim.Adam(parameters, lr=lr, betas=betas, weight_decay=decay, amsgrad=True)
        case "SGD":
            return torch.optim.SGD(parameters, lr=lr, momentum=momentum, weight_decay=decay)
        case "RMSprop":
            return torch.optim.RMSprop(parameters, lr=lr, momentum=momentum, weight_decay=decay)
        case "Rprop":
            return torch.optim.Rprop(parameters, lr=lr)
    raise ValueError(f"unknown optimizer {settings.optimizer!r}; use Adam, amsgrad, SGD, RMSprop or Rprop")


def learning_rate(settings: OptimSettings, epoch: int) -> float:
    """Learning rate of one epoch, counted from 0.

    ``cosine``: lr in epochs 0 and 1, then ``lr * cos(99 pi (e - 1) / (200 (K - 1)))`` with K the last value
    of the schedule; the lag of one epoch is the original's. ``decay``: a tenth after each epoch of the schedule.
    """
    if settings.schedule_type == "decay":
        return settings.lr * 0.1 ** sum(epoch >= milestone for milestone in settings.schedule)
    if epoch <= 1:
        return settings.lr
    return settings.lr * math.cos(99 * math.pi * (epoch - 1) / (200 * (settings.epochs - 1)))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every parameter group the learning rate ``lr``."""
    for group in optimizer.param_groups:
        group["lr"] = lr
