"""Steps give the same gradients in one process, in several, and on replicas as DataParallel makes them."""

from __future__ import annotations

import hashlib
import itertools
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel, gather, replicate
from torch.nn.parallel.scatter_gather import scatter_kwargs

from learners.build import StepCompiler
from learners.distillers import DISTILLERS
from learners.learner import TrainResult
from models.prompts import PROMPTS
from tests.learners import small
from tests.processes import Group
from utils.config import OptimConfig
from utils.parallel import Parallel, SeveralGPUs, build_parallel, choose_device, leave_group, lost_process

BATCH = 12  # divides by 2, 3 and 4
# An orthogonality penalty and prompts on several blocks, which the tables' values do not switch on.
VARIANTS = [("CODAPrompt", "KD_Token", (7, 4, 0.1)), ("L2P", "KD_Token", (30, 20, 1))]
CASES = [(*names, None) for names in itertools.product(PROMPTS, DISTILLERS)] + VARIANTS
WEIGHTS = torch.linspace(0.5, 2, small.CLASSES, dtype=torch.float64)


def build(case, where, **options):
    """A learner in float64 that runs at ``where``, with an optimizer that keeps small differences small."""
    learner_name, kd_method, prompt_param = case
    optim = OptimConfig(optimizer="SGD", lr=0.01, schedule=(2,))
    learner = small.learner(
        learner_name,
        kd_method,
        prompt_param=prompt_param,
        dtype=torch.float64,
        optim=optim,
        aux_loss_scale=2.0,
        parallel=where,
        **options,
    )
    return learner


def compare(case, where, tasks=2, **options):
    """Train equal learners on the same global batches, one at ``where`` (with ``options``) and one alone.

    Returns:
        largest difference of a loss or gradient, on the first process; pairs of bytes that DDP reduced in a step
        and bytes of the trained parameters; SHA-256 of the learned parameters.
    """
    ours = build(case, where, **options)
    alone = build(case, Parallel(where.device)) if where.rank == 0 else None
    # The teacher's training is the same for all KD methods: once for each pool is enough.
    roles = ours.roles if case[1] == "KD_Token" else ours.roles[-1:]
    worst, volumes = 0.0, set()
    for task in range(tasks):
        for learner in filter(None, (ours, alone)):
            learner.begin_task(task)
        for role in roles:
            training = ours.begin_training(role, small.classes_of(task), WEIGHTS)
            reference = alone.begin_training(role, small.classes_of(task), WEIGHTS) if alone else None
            sent: list[int] = []
            if isinstance(training.run, DistributedDataParallel):
                training.run.register_comm_hook(sent, reduce_and_count)
            for seed in range(2):
                sent.clear()
                images, targets = small.batch_of(task, torch.float64, size=BATCH, seed=seed)
                images, targets = images.to(where.device), targets.to(where.device)
                rows = slice(where.rank * BATCH // where.world_size, (where.rank + 1) * BATCH // where.world_size)
                losses, correct = averaged(training.train_step(images[rows], targets[rows]), where)
                volumes.add((sum(sent), sum(p.numel() * p.element_size() for p in training.parameters)))
                if reference:
                    expected, expected_correct = averaged(reference.train_step(images, targets), alone.parallel)
                    assert correct == expected_correct
                    pairs = [(losses, expected)]
                    pairs += [(a.grad, b.grad) for a, b in zip(training.parameters, reference.parameters, strict=True)]
                    worst = max(worst, *((a - b).abs().max().item() for a, b in pairs))
    return worst, volumes, digest(ours)


def averaged(result: TrainResult, where) -> tuple[torch.Tensor, torch.Tensor]:
    """All losses and the gradient's norm, averaged over processes, and the number of correct answers."""
    losses = torch.stack([value.double() for value in (result.loss, *result.terms.values(), result.gradient)])
    return where.sum(losses) / where.world_size, where.sum(result.correct)


def digest(learner) -> str:
    tensors = [tensor for role in learner.roles for tensor in learner.state(role).values()]
    return hashlib.sha256(b"".join(tensor.cpu().numpy().tobytes() for tensor in tensors)).hexdigest()


def reduce_and_count(sent: list[int], bucket):
    sent.append(bucket.buffer().numel() * bucket.buffer().element_size())
    return allreduce_hook(None, bucket)


# ------------------------------------------------------------------------------------- several processes


def compare_all(cases, tasks, device="cpu"):
    where = build_parallel(device, None, timeout_s=120)
    report = {case: compare(case, where, tasks) for case in cases}
    leave_group()
    return report


def assert_equal_gradients(processes, cases, tasks, device="cpu"):
    with Group(processes, compare_all, cases, tasks, device) as group:
        outcomes = group.outcomes(timeout=300)
    assert [outcome.code for outcome in outcomes] == [0] * processes, outcomes[0].output
    for case in cases:
        differences, volumes, learned = zip(*(outcome.result[case] for outcome in outcomes), strict=True)
        assert max(differences) < 1e-9, case
        assert len(set(learned)) == 1, f"{case}: the models differ between processes"
        for reduced, trained in set.union(*volumes):
            assert reduced == trained > 0, f"{case}: {reduced} bytes reduced, {trained} bytes trained"


@pytest.mark.parametrize("processes, cases, tasks", [(2, CASES, 2), (3, CASES, 1), (4, VARIANTS, 2)])
def test_processes_compute_the_gradient_of_one(processes, cases, tasks):
    """Also: they exchange the trained parameters' bytes and nothing else, and grow the pools alike."""
    assert_equal_gradients(processes, cases, tasks)


def compare_with_a_compiler_on_one():
    where = build_parallel("cpu", None, timeout_s=60)

    def backend(graph, examples):
        if where.rank == 1:
            raise RuntimeError("no compiler")
        return graph.forward

    worst, _, learned = compare(("L2P", "KD", None), where, 1, compile_step=StepCompiler(backend))
    leave_group()
    return worst, learned


def test_a_process_without_a_compiler_computes_with_the_others():
    with Group(2, compare_with_a_compiler_on_one) as group:
        outcomes = group.outcomes(timeout=120)
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes[0].output
    (worst, of_first), (_, of_second) = (outcome.result for outcome in outcomes)
    assert worst < 1e-9 and of_first == of_second
    assert ["no compiler" in outcome.output for outcome in outcomes] == [False, True]


def gradients_inside(rank, world_size):
    """The gradients that a process's backward pass carries to the head in fp16, and the norm of the update's."""
    where = Parallel(torch.device("cpu"))
    where.world_size = world_size
    learner = small.learner("L2P", "KD", reduced=torch.float16, seed=1, parallel=where)
    training = learner.begin_training("teacher", small.classes_of(0))
    inside = []
    learner.teacher.last.register_full_backward_hook(lambda module, given, coming: inside.append(coming[0]))
    rows = slice(rank * BATCH // world_size, (rank + 1) * BATCH // world_size)
    images, targets = small.batch_of(0, size=BATCH)
    norm = training.train_step(images[rows], targets[rows]).gradient
    return torch.cat(inside), norm


def test_fp16_gradients_are_as_large_in_several_processes_as_in_one():
    """Inside of a model, where they overflow: DDP divides by the number of processes only at the end."""
    one, norm = gradients_inside(0, 1)
    of_two, norms = zip(*(gradients_inside(rank, 2) for rank in range(2)), strict=True)
    torch.testing.assert_close(torch.cat(of_two), one, rtol=0.02, atol=1e-3 * one.abs().max().item())
    assert norm.isfinite() and all(norm.isfinite() for norm in norms)


def begin_with_other_numbers():
    """Every process's parameters, drawn from other seeds, before and after training begins."""
    where = build_parallel("cpu", None, timeout_s=60)
    learner = build(("DualPrompt", "KD_Token", None), where, seed=1 + where.rank)
    before = learner.student.last.weight.detach().clone()
    training = learner.begin_training("student", small.classes_of(0), WEIGHTS)
    values = where.gather(torch.cat([parameter.detach().flatten() for parameter in training.parameters]))
    assert build_parallel("cpu", None).broadcast(f"from {where.rank}") == "from 0"  # the group is joined once
    leave_group()
    return torch.equal(before, learner.student.last.weight), values


def test_training_begins_with_the_first_processs_parameters():
    with Group(2, begin_with_other_numbers) as group:
        outcomes = group.outcomes()
    for rank, (code, result, output) in enumerate(outcomes):
        assert code == 0, output
        unchanged, (of_first, of_second) = result
        assert unchanged == (rank == 0)
        assert torch.equal(of_first, of_second)


def exchange_until_lost(timeout_s):
    where = build_parallel("cpu", None, timeout_s=timeout_s)
    where.sum(torch.ones(1))
    print("begun", flush=True)
    try:
        while True:
            where.sum(torch.ones(1))
    except RuntimeError as error:
        return lost_process(error)


@pytest.mark.parametrize(("signum", "timeout_s"), [(signal.SIGKILL, 300), (signal.SIGSTOP, 2)])
def test_a_lost_process_ends_the_others(signum, timeout_s):
    """They notice at once when one dies, and after the timeout when one hangs."""
    with Group(3, exchange_until_lost, timeout_s) as group:
        group.wait_for("begun")
        group.send(signum, rank=1)
        outcomes = group.outcomes([0, 2], timeout=60)
    assert [outcome.result for outcome in outcomes] == [True, True], outcomes


def test_other_errors_are_no_lost_process():
    assert not lost_process(RuntimeError("CUDA out of memory"))


# --------------------------------------------------------------------------------------- DataParallel


class Replicas(nn.Module):
    """``nn.DataParallel`` on the CPU (see ``data_parallel_on_cpu``)."""

    def __init__(self, step: nn.Module, parts: int) -> None:
        super().__init__()
        self.module = step
        self.parts = parts

    def forward(self, *inputs):
        scattered, _ = scatter_kwargs(inputs, {}, range(self.parts))
        replicas = replicate(self.module, range(len(scattered)), not torch.is_grad_enabled())
        with_gradient = torch.is_grad_enabled()

        def apply(replica: nn.Module, own: tuple):
            torch.set_grad_enabled(with_gradient)  # of the caller's modes DataParallel hands on no other one
            return replica(*own)

        with ThreadPoolExecutor(self.parts) as threads:
            return gather(list(threads.map(apply, replicas, scattered)), 0)


class OnReplicas(Parallel):
    def __init__(self, parts: int) -> None:
        super().__init__(torch.device("cpu"))
        self.parts = parts

    def wrap(self, step: nn.Module) -> nn.Module:
        return Replicas(step, self.parts)


@pytest.fixture
def data_parallel_on_cpu(monkeypatch):
    """torch's own scatter, replicate and gather, with chunks and copies where tensors would change the GPU."""

    def copies(tensors, devices, detach=False):
        return [[tensor.detach().clone() if detach else tensor.clone() for tensor in tensors] for _ in devices]

    def joined(target, dim, *tensors):
        assert all(tensor.dim() for tensor in tensors)  # scalars would be gathered with a warning
        return torch.cat(tensors, dim)

    module = sys.modules["torch.nn.parallel.replicate"]
    monkeypatch.setattr(module, "_broadcast_coalesced_reshape", copies)
    monkeypatch.setattr(module, "_get_device_index", lambda index, *_: index)
    module = sys.modules["torch.nn.parallel.scatter_gather"]
    cut = SimpleNamespace(apply=lambda targets, sizes, dim, tensor: tensor.chunk(len(targets), dim))
    monkeypatch.setattr(module, "Scatter", cut)
    monkeypatch.setattr(module, "Gather", SimpleNamespace(apply=joined))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_replicas_compute_the_gradient_of_one_device(case, data_parallel_on_cpu):
    worst, _, _ = compare(case, OnReplicas(2))
    assert worst < 1e-9


@pytest.mark.parametrize("images", [1, 2, 5, 12])
def test_replicas_count_the_same_answers(images, data_parallel_on_cpu):
    """Also when the last images of a test set are fewer than the devices."""
    learners = [build(("L2P", "KD_Token", None), where) for where in (OnReplicas(3), Parallel(torch.device("cpu")))]
    assert_same_counts(learners, *small.batch_of(0, torch.float64, size=images))


def assert_same_counts(learners, images, targets):
    """As the trainer asks for them: in inference mode, which does not reach the threads of the replicas."""
    with torch.inference_mode():
        results, expected = (learner.evaluator()(images, targets, 4) for learner in learners)
    assert {role: count.sum() for role, count in results.correct.items()} == expected.correct
    assert results.not_finite.sum() == expected.not_finite == 0


# ------------------------------------------------------------------------------------------------ devices


@pytest.mark.parametrize("device, gpuids, local_rank, gpus, chosen", [
    (None, None, 0, 0, "cpu"),
    (None, None, 0, 2, "cuda:0"),
    (None, None, 1, 2, "cuda:1"),
    (None, (-1,), 0, 2, "cpu"),
    (None, (3,), 0, 4, "cuda:3"),
    (None, (2, 3), 1, 4, "cuda:3"),
    ("cpu", None, 1, 2, "cpu"),
    ("cuda", None, 1, 2, "cuda:1"),
    ("cuda", (1,), 0, 2, "cuda:1"),
    ("mps", None, 0, 0, "mps"),
])
def test_device_of_a_process(device, gpuids, local_rank, gpus, chosen, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    assert choose_device(device, gpuids, local_rank) == torch.device(chosen)


def test_kind_of_parallelism(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert type(build_parallel(None, (-1,))) is Parallel
    assert type(build_parallel(None, (1,))) is Parallel
    several = build_parallel(None, (1, 3))
    assert current == [torch.device("cuda:1")] * 2  # no other GPU is touched
    assert isinstance(several, SeveralGPUs)
    assert (several.device, several.gpuids, several.world_size) == (torch.device("cuda:1"), [1, 3], 1)
    monkeypatch.setenv("RANK", "1")
    assert type(build_parallel(None, (-1,), alone=True)) is Parallel


# --------------------------------------------------------------------------------------------------- GPUs

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
needs_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gpu_computes_the_gradient_of_the_cpu(case):
    ours, alone = (build(case, Parallel(torch.device(device))) for device in ("cuda", "cpu"))
    images, targets = small.batch_of(0, torch.float64, size=BATCH)
    training, reference = (
        learner.begin_training("student", small.classes_of(0), WEIGHTS) for learner in (ours, alone)
    )
    training.train_step(images.cuda(), targets.cuda())
    reference.train_step(images, targets)
    for own, other in zip(training.parameters, reference.parameters, strict=True):
        torch.testing.assert_close(own.grad.cpu(), other.grad, rtol=0, atol=1e-9)


@pytest.mark.multi_gpu
@needs_gpus
@pytest.mark.parametrize("case", CASES, ids=str)
def test_several_gpus_compute_the_gradient_of_one(case):
    worst, _, _ = compare(case, SeveralGPUs((0, 1)))
    assert worst < 1e-9


@pytest.mark.multi_gpu
@needs_gpus
@pytest.mark.parametrize("images", [1, 5])
def test_several_gpus_count_the_same_answers(images):
    places = (SeveralGPUs((0, 1)), Parallel(torch.device("cuda", 0)))
    batch, targets = (tensor.cuda() for tensor in small.batch_of(0, torch.float64, size=images))
    assert_same_counts([build(("L2P", "KD_Token", None), place) for place in places], batch, targets)


@pytest.mark.multi_gpu
@needs_gpus
def test_processes_with_a_gpu_each_compute_the_gradient_of_one():
    assert_equal_gradients(2, CASES, 2, "cuda")
