"""Where steps run: one device, several GPUs of one process, or several processes.

The trainer has one object of this kind and no branch of its own. The batch size is always global, losses are
means over all rows of the global batch, counts are sums.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Parallel(Protocol):
    """What the trainer and the learner need to know of the devices.

    Attributes:
        device: where batches go and parameters live.
        rank: index of this process.
        world_size: number of processes, each of which loads its rows of every global batch.
        replicas: number of parts in which a global batch is computed.
    """

    device: torch.device
    rank: int
    world_size: int
    replicas: int

    def wrap(self, step: nn.Module) -> nn.Module:
        """Return the step as it is to be called, on this process's rows."""

    def wrap_evaluation(self, step: nn.Module) -> nn.Module:
        """The same for a step without gradients."""

    def synchronize(self, step: nn.Module, *, last: bool) -> contextlib.AbstractContextManager:
        """Around forward and backward of one part of an accumulated batch; gradients meet in the last."""

    def sum(self, values: Tensor) -> Tensor:
        """Sum over all processes."""

    def mean(self, values: Tensor) -> Tensor:
        """Mean over all processes."""

    def broadcast(self, value: Any) -> Any:
        """The first process's value, on all processes."""

    def close(self) -> None:
        """Leave the group of processes."""


class SingleDevice:
    """One CPU or GPU."""

    rank = 0
    world_size = 1
    replicas = 1

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def wrap(self, step: nn.Module) -> nn.Module:
        return step

    def wrap_evaluation(self, step: nn.Module) -> nn.Module:
        return self.wrap(step)

    def synchronize(self, step: nn.Module, *, last: bool) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def sum(self, values: Tensor) -> Tensor:
        return values

    def mean(self, values: Tensor) -> Tensor:
        return values

    def broadcast(self, value: Any) -> Any:
        return value

    def close(self) -> None:
        pass


class SeveralGPUs(SingleDevice):
    """``torch.nn.DataParallel`` over the GPUs of one process, as the original's ``--gpuid 0 1``."""

    def __init__(self, gpuids: Sequence[int]) -> None:
        super().__init__(torch.device("cuda", gpuids[0]))
        self.gpuids = list(gpuids)
        self.replicas = len(self.gpuids)

    def wrap(self, step: nn.Module) -> nn.Module:
        return nn.DataParallel(step, device_ids=self.gpuids)


class Distributed:
    """One process of a ``torchrun`` group: DistributedDataParallel, nccl on GPUs and gloo on CPUs.

    Args:
        device: this process's device.
        timeout_s: seconds after which a collective operation without an answer ends the process with an error.
    """

    def __init__(self, device: torch.device, timeout_s: float) -> None:
        self.device = device
        backend = "nccl" if device.type == "cuda" else "gloo"
        timeout = datetime.timedelta(seconds=timeout_s)
        torch.distributed.init_process_group(backend, timeout=timeout)
        self.rank = torch.distributed.get_rank()
        self.world_size = self.replicas = torch.distributed.get_world_size()

    def wrap(self, step: nn.Module) -> nn.Module:
        """A new reducer for what is trained now; frozen parts are neither broadcast nor reduced."""
        frozen = [name for name, p in step.named_parameters() if not p.requires_grad]
        frozen += [name for name, _ in step.named_buffers()]
        ignore = nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
        ignore(step, frozen)
        ids = [self.device.index] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(step, device_ids=ids, broadcast_buffers=False)

    def wrap_evaluation(self, step: nn.Module) -> nn.Module:
        return step  # counts are summed by the caller

    def synchronize(self, step: nn.Module, *, last: bool) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if last else step.no_sync()

    def sum(self, values: Tensor) -> Tensor:
        values = values.clone()
        torch.distributed.all_reduce(values)
        return values

    def mean(self, values: Tensor) -> Tensor:
        return self.sum(values) / self.world_size

    def broadcast(self, value: Any) -> Any:
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def close(self) -> None:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def choose_device(device: str | None, gpuids: Sequence[int] | None, local_rank: int = 0) -> torch.device:
    """The device of this process.

    Args:
        device: ``--device`` ("cpu", "cuda", "cuda:1", "mps"), which wins, or None.
        gpuids: ``--gpuid``; (-1,) is the CPU, None GPU 0 where there is one.
        local_rank: index of this process on its machine under torchrun.
    """
    if device is not None:
        chosen = torch.device(device)
        if chosen.type == "cuda" and chosen.index is None:
            return torch.device("cuda", local_rank)
        return chosen
    if gpuids == (-1,) or not torch.cuda.is_available():
        return torch.device("cpu")
    if not gpuids:
        return torch.device("cuda", local_rank)
    return torch.device("cuda", gpuids[local_rank % len(gpuids)])


def build_parallel(device: str | None, gpuids: Sequence[int] | None, *, timeout_s: float = 300.0) -> Parallel:
    """Choose by the environment and the flags: torchrun's processes, several GPUs, or one device."""
    if "RANK" in os.environ:
        chosen = choose_device(device, gpuids, int(os.environ.get("LOCAL_RANK", "0")))
        if chosen.type == "cuda":
            torch.cuda.set_device(chosen)
        return Distributed(chosen, timeout_s)
    if device is None and gpuids and len(gpuids) > 1:
        return SeveralGPUs(gpuids)
    return SingleDevice(choose_device(device, gpuids))
