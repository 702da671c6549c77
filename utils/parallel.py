"""Where steps run: one device, several GPUs of one process, or several processes.

The trainer has one object of this kind and no branch of its own. The batch size is always global, losses are
means over all rows of the global batch, counts are sums.
"""

from __future__ import annotations

import contextlib
import datetime
import inspect
import os
import socket
import struct
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

# A process that does not answer for this long is given up by the others. A process that dies is noticed at once,
# unless its whole machine or network goes without a word. Reading a batch, saving and evaluating take less.
TIMEOUT_S = 300.0

_NOT_MET = (
    "the processes of this run have not found each other: they must all be started, and reach each other over the "
    "network interface GLOO_SOCKET_IFNAME (NCCL_SOCKET_IFNAME on GPUs)"
)
_SIOCGIFADDR = 0x8915  # Linux's request for an interface's address

# What keeps DDP from sending buffers before each step has a new name in newer versions of torch.
_OPTIONS = inspect.signature(DistributedDataParallel).parameters
_NO_BUFFERS = {"forward_sync_buffers" if "forward_sync_buffers" in _OPTIONS else "broadcast_buffers": False}


class Parallel(Protocol):
    """What the trainer and the learner need to know of the devices.

    Attributes:
        device: where batches go and parameters live.
        rank: index of this process.
        world_size: number of processes, each of which loads its rows of every global batch.
    """

    device: torch.device
    rank: int
    world_size: int

    def wrap(self, step: nn.Module) -> nn.Module:
        """Return the step as it is to be called, on this process's rows."""

    def wrap_evaluation(self, step: nn.Module) -> nn.Module:
        """The same for a step without gradients."""

    def synchronize(self, step: nn.Module, *, last: bool) -> contextlib.AbstractContextManager:
        """Around forward and backward of one part of an accumulated batch; gradients meet in the last."""

    def sum(self, values: Tensor) -> Tensor:
        """Sum over all processes."""

    def broadcast(self, value: Any) -> Any:
        """The first process's value, on all processes."""

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, on all processes, by rank."""


class SingleDevice:
    """One CPU or GPU."""

    rank = 0
    world_size = 1

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

    def broadcast(self, value: Any) -> Any:
        return value

    def gather(self, value: Any) -> list[Any]:
        return [value]


class SeveralGPUs(SingleDevice):
    """``torch.nn.DataParallel`` over the GPUs of one process, as the original's ``--gpuid 0 1``."""

    def __init__(self, gpuids: Sequence[int]) -> None:
        super().__init__(torch.device("cuda", gpuids[0]))
        self.gpuids = list(gpuids)

    def wrap(self, step: nn.Module) -> nn.Module:
        return DataParallel(step, device_ids=self.gpuids)


class Distributed:
    """One process of a ``torchrun`` group: DistributedDataParallel, nccl on GPUs and gloo on CPUs.

    The group is joined by the first object and left by :func:`leave_group`, since a process can join only once.

    Args:
        device: this process's device.
        timeout_s: seconds after which an exchange between processes without an answer ends with an error.
    """

    def __init__(self, device: torch.device, timeout_s: float) -> None:
        self.device = device
        if not torch.distributed.is_initialized():
            on_gpu = device.type == "cuda"
            if not on_gpu and (interface := interface_towards(os.environ.get("MASTER_ADDR", ""))):
                os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
            with _end_after(timeout_s + 5, _NOT_MET):
                torch.distributed.init_process_group(
                    "nccl" if on_gpu else "gloo",
                    timeout=datetime.timedelta(seconds=timeout_s),
                    device_id=device if on_gpu else None,
                )
        self.rank = torch.distributed.get_rank()
        self.world_size = torch.distributed.get_world_size()

    def wrap(self, step: nn.Module) -> nn.Module:
        """A new reducer for what is trained now; nothing else is sent, neither now nor later.

        Frozen weights are equal by their checksums, and a trained parameter starts as on rank 0.
        """
        trained = [parameter for parameter in step.parameters() if parameter.requires_grad]
        with torch.no_grad():
            start = nn.utils.parameters_to_vector(trained)
            torch.distributed.broadcast(start, src=0)
            for parameter, values in zip(trained, start.split([p.numel() for p in trained]), strict=True):
                parameter.copy_(values.view_as(parameter))
        ids = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(step, device_ids=ids, init_sync=False, **_NO_BUFFERS)

    def wrap_evaluation(self, step: nn.Module) -> nn.Module:
        return step  # counts are summed by the caller

    def synchronize(self, step: nn.Module, *, last: bool) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if last else step.no_sync()

    def sum(self, values: Tensor) -> Tensor:
        values = values.clone()
        torch.distributed.all_reduce(values)
        return values

    def broadcast(self, value: Any) -> Any:
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(values, value)
        return values


@contextlib.contextmanager
def _end_after(seconds: float, problem: str) -> Iterator[None]:
    """End the process if the block takes longer: gloo waits five times its timeout for others to connect."""

    def end() -> None:
        os.write(2, f"ERROR: Process {os.environ['RANK']}: {problem}\n".encode())
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def interface_towards(host: str) -> str | None:
    """The network interface through which this machine reaches ``host``; None for itself, or if it cannot be told.

    Left to itself gloo takes the address of this machine's own name, which on many machines is 127.0.0.1.
    """
    if sys.platform != "linux":
        return None
    import fcntl

    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))  # sends nothing
            address = probe.getsockname()[0]
            for _, name in socket.if_nameindex():
                request = struct.pack("256s", name.encode())
                with contextlib.suppress(OSError):  # an interface without an address
                    own = fcntl.ioctl(probe, _SIOCGIFADDR, request)[20:24]
                    if socket.inet_ntoa(own) == address and not address.startswith("127."):
                        return name
    except OSError:
        pass
    return None


def leave_group() -> None:
    """Leave the group of processes, if there is one; only where no other process is waited for."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def lost_process(error: RuntimeError) -> bool:
    """Whether an error in a group says that another process is gone or does not answer."""
    # What gloo raises has no type of its own.
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error).lower()


def choose_device(device: str | None, gpuids: Sequence[int] | None, local_rank: int = 0) -> torch.device:
    """The device of this process.

    Args:
        device: ``--device``, a kind ("cpu", "cuda", "mps") or a torch name ("cuda:1"), or None.
        gpuids: ``--gpuid``; (-1,) is the CPU. With neither, a GPU where there is one.
        local_rank: index of this process on its machine under torchrun.
    """
    if device not in (None, "cuda"):
        return torch.device(device)
    if device is None and (gpuids == (-1,) or not torch.cuda.is_available()):
        return torch.device("cpu")
    return torch.device("cuda", gpuids[local_rank] if gpuids else local_rank)


def build_parallel(
    device: str | None, gpuids: Sequence[int] | None, *, alone: bool = False, timeout_s: float = TIMEOUT_S
) -> Parallel:
    """Choose by the environment and the flags: torchrun's processes, several GPUs, or one device.

    Args:
        device, gpuids: as for :func:`choose_device`.
        alone: do not join torchrun's group.
        timeout_s: as for :class:`Distributed`.
    """
    in_group = "RANK" in os.environ and not alone
    chosen = choose_device(device, gpuids, int(os.environ.get("LOCAL_RANK", "0")) if in_group else 0)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)  # else what names no GPU, as the thread that pins batches, occupies GPU 0
    if in_group:
        return Distributed(chosen, timeout_s)
    if chosen.type == "cuda" and gpuids and len(gpuids) > 1:
        return SeveralGPUs(gpuids)
    return SingleDevice(chosen)
