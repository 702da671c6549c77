"""Where steps run: one device, several GPUs of one process, or several processes.

The trainer has one object of this kind and no branch of its own. The batch size is always global, losses are means
over all rows of the global batch, counts are sums.
"""

import contextlib
import copy
import inspect
import itertools
import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from utils.checkpoint import RunFolderError
from utils.config import ConfigError

# Processes give up one that does not answer for this long; reading a batch, saving and evaluating take less. They
# notice at once when one dies, unless its whole machine or network fails silently.
TIMEOUT_S = 300.0

# The option that keeps DDP from sending buffers before each step has a new name in newer versions of torch.
_OPTIONS = inspect.signature(DistributedDataParallel).parameters
_NO_BUFFERS = {"forward_sync_buffers" if "forward_sync_buffers" in _OPTIONS else "broadcast_buffers": False}

T = TypeVar("T")


class Parallel:
    """One CPU or GPU, and the interface of the other two.

    Attributes:
        device: where batches go and parameters live.
        rank: index of this process.
        world_size: number of processes, each of which loads its rows of every global batch.
    """

    rank = 0
    world_size = 1

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @property
    def is_main(self) -> bool:
        """Whether this process writes files."""
        return self.rank == 0

    def wrap(self, step: nn.Module) -> nn.Module:
        """Return the step as it is to be called, on this process's rows."""
        return step

    def wrap_evaluation(self, step: nn.Module) -> nn.Module:
        """The same for a step without gradients."""
        return self.wrap(step)

    def synchronize(self, step: nn.Module, *, last: bool) -> contextlib.AbstractContextManager:
        """Around forward and backward of one part of an accumulated batch; gradients meet in the last."""
        return contextlib.nullcontext()

    def sum(self, values: Tensor) -> Tensor:
        """Sum over all processes."""
        return values

    def broadcast(self, value: Any) -> Any:
        """The first process's value, on all processes."""
        return value

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, on all processes, by rank."""
        return [value]

    def all_or_none(self, action: Callable[[], T]) -> T:
        """Run ``action`` on all processes; if it cannot start on one, it fails on all.

        Raises ConfigError, with the problems of all processes on the first one and without any on the others.
        """
        problems, result = [], None
        try:
            result = action()
        except (ConfigError, RunFolderError) as error:
            problems = getattr(error, "problems", [str(error)])
        everyones = self.gather(problems)
        if any(everyones):
            others = [(rank, each) for rank, theirs in enumerate(everyones) for each in theirs]
            others = [f"process {rank}: {each}" for rank, each in others if each not in everyones[0]]
            raise ConfigError(everyones[0] + others if self.is_main else [])
        return result


class SeveralGPUs(Parallel):
    """``torch.nn.DataParallel`` over the GPUs of one process, as the original's ``--gpuid 0 1``.

    All steps share one copy of each tensor on each further GPU. What a step does not train is sent when it is wrapped,
    and then stays there.
    """

    def __init__(self, gpuids: Sequence[int]) -> None:
        super().__init__(torch.device("cuda", gpuids[0]))
        self.gpuids = list(gpuids)
        self._copies: list[dict[Tensor, Tensor]] = [{} for _ in gpuids[1:]]

    def wrap(self, step: nn.Module) -> nn.Module:
        trained = {name: p for name, p in step.named_parameters() if p.requires_grad}
        return _Replicas(self._replicas(step, trained), trained, self.gpuids)

    def wrap_evaluation(self, step: nn.Module) -> nn.Module:
        return _Replicas(self._replicas(step, {}), {}, self.gpuids)

    @torch.inference_mode(False)  # a tensor made in it could not be used in training
    @torch.no_grad()
    def _replicas(self, step: nn.Module, trained: dict[str, nn.Parameter]) -> list[nn.Module]:
        """The modules of ``step`` once for each GPU, on its tensors there, without the ``trained`` ones."""
        placeholders = {id(p): p for p in trained.values()}
        kept = [x for x in (*step.parameters(), *step.buffers()) if id(x) not in placeholders]
        replicas = [copy.deepcopy(step, placeholders | {id(x): x for x in kept})]
        for gpu, copies in zip(self.gpuids[1:], self._copies, strict=True):
            for tensor in kept:
                if tensor not in copies:
                    copies[tensor] = torch.empty_like(tensor, device=torch.device(self.device.type, gpu))
                copies[tensor].copy_(tensor)
            replicas.append(copy.deepcopy(step, placeholders | {id(x): copies[x] for x in kept}))
        for replica, name in itertools.product(replicas, trained):
            module, _, attribute = name.rpartition(".")
            delattr(replica.get_submodule(module), attribute)
        return replicas


class _Replicas(DataParallel):
    """A step on several GPUs, of which each call sends the ``trained`` parameters, by name in the step.

    ``replicas`` are its modules for each GPU without these, as they were when the step was wrapped.
    """

    def __init__(self, replicas: Sequence[nn.Module], trained: dict[str, nn.Parameter], gpuids: Sequence[int]) -> None:
        sent = nn.Module()
        for name, parameter in trained.items():
            sent.register_parameter(name.replace(".", "/"), parameter)
        super().__init__(sent, device_ids=gpuids)
        self._replicas = tuple(replicas)  # not a list or submodules, which would be moved and counted
        self._places = [
            [(replica.get_submodule(name.rpartition(".")[0]), name) for name in trained] for replica in replicas
        ]

    def replicate(self, module: nn.Module, device_ids: Sequence[int]) -> list[nn.Module]:
        """The replicas, with the trained parameters as they are now."""
        for sent, places in zip(super().replicate(module, device_ids), self._places, strict=False):
            for owner, name in places:
                setattr(owner, name.rpartition(".")[2], getattr(sent, name.replace(".", "/")))
        return list(self._replicas[: len(device_ids)])

    def parallel_apply(self, replicas: Sequence[nn.Module], inputs: Sequence[Any], kwargs: Any) -> list[Any]:
        """Launch one replica after the other: GPUs work on while the host continues, which threads would slow down."""
        outputs = []
        for gpu, replica, own in zip(self.device_ids, replicas, inputs, strict=False):
            with torch.cuda.device(gpu):
                outputs.append(replica(*own))
        return outputs


class Distributed(Parallel):
    """One process of a ``torchrun`` group: DistributedDataParallel, nccl on GPUs and gloo on CPUs.

    The first object joins the group, since a process can join only once; :func:`leave_group` leaves it.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        if not torch.distributed.is_initialized():
            backend, device_id = ("nccl", device) if device.type == "cuda" else ("gloo", None)
            torch.distributed.init_process_group(backend, timeout=timedelta(seconds=TIMEOUT_S), device_id=device_id)
        self.rank = torch.distributed.get_rank()
        self.world_size = torch.distributed.get_world_size()

    def wrap(self, step: nn.Module) -> nn.Module:
        """A new reducer for the parameters that are trained now; nothing else is sent, neither now nor later.

        Frozen weights are equal by their checksums, and a trained parameter starts as on rank 0.
        """
        for parameter in (parameter for parameter in step.parameters() if parameter.requires_grad):
            torch.distributed.broadcast(parameter.detach(), src=0)
        ids = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(step, device_ids=ids, init_sync=False, **_NO_BUFFERS)

    def wrap_evaluation(self, step: nn.Module) -> nn.Module:
        return step  # the caller sums the counts

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


def is_main_process() -> bool:
    """Whether this is the only process, or the first of a group, which writes files."""
    return os.environ.get("RANK", "0") == "0"


def leave_group() -> None:
    """Leave the group of processes, if there is one; only where no other process waits."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def lost_process(error: RuntimeError) -> bool:
    """Whether an error in a group says that another process is gone or does not answer; gloo's have no own type."""
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error).lower()


def choose_device(device: str | None, gpuids: Sequence[int] | None, local_rank: int | None = None) -> torch.device:
    """The (first) device of this process: with neither ``--device`` nor ``--gpuid``, a GPU if torch can use it.

    ``local_rank`` is its index on its machine under torchrun, where each process uses one GPU. Raises ConfigError if
    torch cannot use a GPU that was asked for.
    """
    if device not in (None, "cuda"):
        return torch.device(device)
    if gpuids == (-1,):
        return torch.device("cpu")
    gpus = gpuids or (local_rank or 0,)
    if gpuids and local_rank is not None:
        gpus = (gpuids[local_rank],)
    problem = cuda_problem(gpus)
    if problem and (gpuids or device):
        asked = f"--gpuid {' '.join(map(str, gpuids))}" if gpuids else "--device cuda"
        raise ConfigError(f"{asked}: {problem}: install a torch that fits the driver, or use --gpuid -1 for the CPU")
    return torch.device("cpu") if problem else torch.device("cuda", gpus[0])


def cuda_problem(gpus: Sequence[int]) -> str | None:
    """Why torch cannot use these GPUs, as a part of a sentence; None if it can."""
    try:
        for gpu in gpus:
            torch.ones(1, device=f"cuda:{gpu}")  # fails also where this torch has no code for the GPU
    except (RuntimeError, AssertionError) as error:  # AssertionError: a torch for CPUs
        built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        reason = str(error).strip().splitlines()[0].rstrip(".")
        return f"torch {torch.__version__}, built {built}, cannot use GPU {' '.join(map(str, gpus))} ({reason})"
    return None


def build_parallel(device: str | None, gpuids: Sequence[int] | None, *, alone: bool = False) -> Parallel:
    """torchrun's processes, several GPUs or one device, by the environment and the flags; ``alone`` joins no group."""
    in_group = "RANK" in os.environ and not alone
    chosen = choose_device(device, gpuids, int(os.environ.get("LOCAL_RANK", "0")) if in_group else None)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)  # else code that names no GPU, such as the pinning thread, occupies GPU 0
    if in_group:
        return Distributed(chosen)
    if chosen.type == "cuda" and gpuids and len(gpuids) > 1:
        return SeveralGPUs(gpuids)
    return Parallel(chosen)
