"""Optimizers and learning-rate schedules of the original's configurations."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from utils.config import OptimConfig


def build_optimizer(parameters: Iterable[nn.Parameter], config: OptimConfig) -> torch.optim.Optimizer:
    """A new optimizer, for one model on one task."""
    name, momentum = config.optimizer, config.momentum
    options = {"lr": config.lr, "weight_decay": config.weight_decay}
    if name in ("Adam", "amsgrad"):
        return torch.optim.Adam(parameters, **options, betas=(momentum, 0.999), amsgrad=name == "amsgrad", fused=True)
    if name == "SGD":
        return torch.optim.SGD(parameters, **options, momentum=momentum, fused=True)
    if name == "RMSprop":
        return torch.optim.RMSprop(parameters, **options, momentum=momentum)
    return torch.optim.Rprop(parameters, lr=config.lr)


def learning_rate(config: OptimConfig, epoch: int) -> float:
    """Learning rate of one epoch, counted from 0.

    ``cosine``: lr in epochs 0 and 1, then ``lr * cos(99 pi (e - 1) / (200 (K - 1)))`` with K the last value
    of the schedule; the lag of one epoch is the original's. ``decay``: a tenth after each epoch of the schedule.
    """
    if config.schedule_type == "decay":
        return config.lr * 0.1 ** sum(epoch >= milestone for milestone in config.schedule)
    if epoch <= 1:
        return config.lr
    return config.lr * math.cos(99 * math.pi * (epoch - 1) / (200 * (config.epochs - 1)))
