"""Optimizers and learning-rate schedules of the original's configurations."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from utils.config import OptimConfig


def build_optimizer(parameters: Iterable[nn.Parameter], config: OptimConfig) -> torch.optim.Optimizer:
    """A new optimizer, for one model on one task."""
    lr, momentum, decay = config.lr, config.momentum, config.weight_decay
    betas = (momentum, 0.999)
    match config.optimizer:
        case "Adam":
            return torch.optim.Adam(parameters, lr=lr, betas=betas, weight_decay=decay, fused=True)
        case "amsgrad":
            return torch.optim.Adam(parameters, lr=lr, betas=betas, weight_decay=decay, amsgrad=True, fused=True)
        case "SGD":
            return torch.optim.SGD(parameters, lr=lr, momentum=momentum, weight_decay=decay, fused=True)
        case "RMSprop":
            return torch.optim.RMSprop(parameters, lr=lr, momentum=momentum, weight_decay=decay)
        case _:
            return torch.optim.Rprop(parameters, lr=lr)


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
