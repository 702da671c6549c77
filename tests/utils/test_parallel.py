"""Steps give the same gradients in one process, in several, and on replicas as DataParallel makes them."""

import contextlib
import hashlib
import itertools
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from learners.build import BlockCompiler
from learners.distillers.base import Distiller
from learners.steps import StepResult
from tests.learners import small
from tests.processes import Group
from utils import parallel
from utils.config import ConfigError, OptimConfig
from utils.parallel import Parallel, SeveralGPUs, build_parallel, choose_device, leave_group

CPU = Parallel(torch.device("cpu"))
BATCH = 12  # divides by 2, 3 and 4
# An orthogonality penalty and prompts on several blocks, which the tables' values do not switch on.
VARIANTS = [("CODAPrompt", "KD_Token", (7, 4, 0.1)), ("L2P", "KD_Token", (30, 20, 1))]
CASES = [(*names, None) for names in small.EACH if names[1] in small.MEANS] + VARIANTS
WEIGHTS = torch.linspace(0.5, 2, small.CLASSES, dtype=torch.float64)


def build(case, where, **options):
    """A learner in float64 that runs at ``where``, with an optimizer that keeps small differences small."""
    optim = OptimConfig(optimizer="SGD", lr=0.01, schedule=(2,))
    options |= {"dtype": torch.float64, "optim": optim, "aux_loss_scale": 2.0, "parallel": where}
    return small.learner(*case[:2], prompt_param=case[2], **options)


def compare(case, where, tasks=2, **options):
    """Train equal learners on the same global batches, one at ``where`` (with ``options``) and one alone.

    Returns the largest difference of a loss or gradient, on the first process; pairs of bytes that DDP reduced in a
    step and bytes of the trained parameters; SHA-256 of the learned parameters.
    """
    ours = build(case, where, **options)
    alone = build(case, Parallel(where.device)) if where.rank == 0 else None
    # The teacher's training is the same for all KD methods: once for each pool is enough.
    roles = ours.roles if case[1] == "KD_Token" else ours.roles[-1:]
    rows = slice(where.rank * BATCH // where.world_size, (where.rank + 1) * BATCH // where.world_size)
    worst, volumes = 0.0, set()
    for task, role in itertools.product(range(tasks), roles):
        if role == roles[0]:
            for learner in filter(None, (ours, alone)):
                learner.begin_task(task)
        training = ours.begin_training(role, small.classes_of(task), WEIGHTS)
        reference = alone.begin_training(role, small.classes_of(task), WEIGHTS) if alone else None
        sent: list[int] = []
        if isinstance(training.run, DistributedDataParallel):
            training.run.register_comm_hook(sent, reduce_and_count)
        for seed in range(2):
            sent.clear()
            batch = [part.to(where.device) for part in small.batch_of(task, torch.float64, size=BATCH, seed=seed)]
            losses, correct = averaged(training.train_step(*(part[rows] for part in batch)), where)
            volumes.add((sum(sent), sum(p.numel() * p.element_size() for p in training.parameters)))
            if reference:
                expected, expected_correct = averaged(reference.train_step(*batch), alone.parallel)
                assert correct == expected_correct
                pairs = [(losses, expected)]
                pairs += [(a.grad, b.grad) for a, b in zip(training.parameters, reference.parameters, strict=True)]
                worst = max(worst, *((a - b).abs().max().item() for a, b in pairs))
    learned = [tensor.cpu().numpy().tobytes() for role in ours.roles for tensor in ours.state(role).values()]
    return worst, volumes, hashlib.sha256(b"".join(learned)).hexdigest()


def averaged(result: StepResult, where) -> tuple[torch.Tensor, torch.Tensor]:
    """All losses and the gradient's norm, averaged over processes, and the number of correct answers."""
    losses = torch.stack([value.double() for value in (result.loss, *result.terms.values(), result.gradient)])
    return where.sum(losses) / where.world_size, where.sum(result.correct)


def reduce_and_count(sent: list[int], bucket):
    sent.append(bucket.buffer().numel() * bucket.buffer().element_size())
    return allreduce_hook(None, bucket)


def compare_all(cases, tasks, device, without_compiler):
    where = build_parallel(device, None)

    def backend(graph, examples):
        if where.rank == without_compiler:
            raise RuntimeError("no compiler")
        return graph.forward

    options = {} if without_compiler is None else {"run_block": BlockCompiler((BATCH // where.world_size,), backend)}
    report = {case: compare(case, where, tasks, **options) for case in cases}
    leave_group()
    return report


def assert_equal_gradients(processes, cases, tasks, device="cpu", without_compiler=None):
    """Returns what the processes printed."""
    with Group(processes, compare_all, cases, tasks, device, without_compiler) as group:
        outcomes = group.outcomes(timeout=300)
    assert [outcome.code for outcome in outcomes] == [0] * processes, outcomes[0].output
    for case in cases:
        differences, volumes, learned = zip(*(outcome.result[case] for outcome in outcomes), strict=True)
        assert max(differences) < 1e-9, case
        assert len(set(learned)) == 1, f"{case}: the models differ between processes"
        for reduced, trained in set.union(*volumes):
            assert reduced == trained > 0, f"{case}: {reduced} bytes reduced, {trained} bytes trained"
    return [outcome.output for outcome in outcomes]


@pytest.mark.parametrize("processes, cases, tasks", [(2, CASES, 2), (3, CASES[::4], 1), (4, VARIANTS, 2)])
def test_processes_compute_the_gradient_of_one(processes, cases, tasks):
    """Also: they exchange the trained parameters' bytes and nothing else, and grow the pools alike."""
    assert_equal_gradients(processes, cases, tasks)


def test_a_process_without_a_compiler_computes_with_the_others():
    outputs = assert_equal_gradients(2, [("L2P", "KD", None)], 1, without_compiler=1)
    assert ["no compiler" in output for output in outputs] == [False, True]


@pytest.mark.parametrize("rank", [0, 1])
def test_fp16_gradients_are_as_large_in_several_processes_as_in_one(rank):
    """Inside of a model, where they overflow: DDP divides by the number of processes only at the end."""
    images, targets = small.batch_of(0, size=BATCH)
    rows, gradients = slice(rank * BATCH // 2, (rank + 1) * BATCH // 2), []
    for size, part in ((1, slice(BATCH)), (2, rows)):
        where = Parallel(torch.device("cpu"))
        where.world_size = size
        learner = small.learner("L2P", "KD", reduced=torch.float16, seed=1, parallel=where)
        training = learner.begin_training("teacher", small.classes_of(0))
        learner.teacher.last.register_full_backward_hook(lambda module, given, coming: gradients.append(coming[0]))
        assert training.train_step(images[part], targets[part]).gradient.isfinite()
    torch.testing.assert_close(gradients[1], gradients[0][rows], rtol=0.02, atol=1e-3 * gradients[0].abs().max().item())


def begin_with_other_numbers():
    """The processes draw from other seeds before training begins."""
    where = build_parallel("cpu", None)
    learner = build(("DualPrompt", "KD_Token", None), where, seed=1 + where.rank)
    before = learner.student.last.weight.detach().clone()
    training = learner.begin_training("student", small.classes_of(0), WEIGHTS)
    of_first, of_second = where.gather(torch.cat([part.detach().flatten() for part in training.parameters]))
    assert torch.equal(of_first, of_second)
    assert torch.equal(before, learner.student.last.weight) == (where.rank == 0)
    assert build_parallel("cpu", None).broadcast(f"from {where.rank}") == "from 0"  # the group is joined once
    leave_group()


def test_training_begins_with_the_first_processs_parameters():
    with Group(2, begin_with_other_numbers) as group:
        outcomes = group.outcomes()
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes


@pytest.fixture
def several_cpus(monkeypatch):
    """``SeveralGPUs`` without GPUs: DataParallel with chunks and copies where tensors would change the GPU."""

    def copies(tensors, devices, detach=False):
        sent.append(sum(tensor.numel() for tensor in tensors))
        return [[tensor.detach().clone() if detach else tensor.clone() for tensor in tensors] for _ in devices]

    def joined(target, dim, *tensors):
        assert all(tensor.dim() for tensor in tensors)  # scalars would be gathered with a warning
        return torch.cat(tensors, dim)

    sent: list[int] = []
    cut = SimpleNamespace(apply=lambda targets, sizes, dim, tensor: tensor.chunk(len(targets), dim))
    for name, patches in {
        "replicate": {"_broadcast_coalesced_reshape": copies, "_get_device_index": lambda index, *_: index},
        "scatter_gather": {"Scatter": cut, "Gather": SimpleNamespace(apply=joined)},
        "data_parallel": {"_get_available_device_type": lambda: "cpu", "_get_device_index": lambda index, *_: index},
    }.items():
        for attribute, value in patches.items():
            monkeypatch.setattr(sys.modules[f"torch.nn.parallel.{name}"], attribute, value)
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())

    def places(number: int) -> SeveralGPUs:
        where = SeveralGPUs(range(number))
        where.device = torch.device("cpu")
        for name in ("wrap", "wrap_evaluation"):
            wrap = getattr(where, name)
            setattr(where, name, lambda step, wrap=wrap: on_cpu(wrap(step)))
        return where

    def on_cpu(step: nn.Module) -> nn.Module:
        step.src_device_obj = torch.device("cpu")
        return step

    return places, sent


@pytest.mark.parametrize("case", CASES, ids=str)
def test_replicas_compute_the_gradient_of_one_device(case, several_cpus):
    """Only what is trained is sent, each parameter once in a step."""
    places, sent = several_cpus
    worst, volumes, _ = compare(case, places(2))
    assert worst < 1e-9
    assert {8 * elements for elements in sent if elements} == {trained for _, trained in volumes}


def test_replicas_know_the_progress(several_cpus, monkeypatch):
    """The second of two epochs begins when half of the phase is done."""
    training = build(("L2P", "KD", None), several_cpus[0](2)).begin_training("student", small.classes_of(0))
    seen, real = [], Distiller.forward
    monkeypatch.setattr(Distiller, "forward", lambda self, *inputs: seen.append(inputs[-1]) or real(self, *inputs))
    training.begin_epoch(1)
    training.train_step(*small.batch_of(0, torch.float64))
    assert seen == [0.5, 0.5]


def test_replicas_count_the_same_answers(several_cpus):
    places, sent = several_cpus
    assert_same_counts(places(3), CPU)
    assert sum(sent) == 0


def assert_same_counts(*places):
    """In inference mode, which does not reach the threads of replicas; also for fewer images than devices."""
    for images in (1, 5):
        batch = [part.to(places[1].device) for part in small.batch_of(0, torch.float64, size=images)]
        with torch.inference_mode():
            results, expected = (build(("L2P", "KD_Token", None), where).evaluator()(*batch, 4) for where in places)
        assert {role: count.sum() for role, count in results.correct.items()} == expected.correct
        assert results.not_finite.sum() == expected.not_finite == 0


def test_device_of_a_process(monkeypatch):
    assert choose_device("mps", None) == torch.device("mps")
    for available, arguments, chosen in (
        (False, (None, None), "cpu"),
        (True, (None, None, 1), "cuda:1"),
        (True, (None, (-1,)), "cpu"),
        (True, (None, (2, 3), 1), "cuda:3"),
        (True, ("cpu", None, 1), "cpu"),
        (True, ("cuda", (1,)), "cuda:1"),
    ):
        monkeypatch.setattr(parallel, "cuda_problem", lambda gpus, available=available: None if available else "no")
        assert choose_device(*arguments) == torch.device(chosen)


@pytest.mark.parametrize(("device", "gpuids", "local_rank"), [(None, (99,), None), ("cuda", (0, 99), 1)])
def test_gpus_that_torch_cannot_use_are_refused(device, gpuids, local_rank):
    with pytest.raises(ConfigError, match=r"^--gpuid .*99: torch .*CUDA.*cannot use GPU 99 \(.+\): "):
        choose_device(device, gpuids, local_rank)


def test_kind_of_parallelism(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(parallel, "cuda_problem", lambda gpus: None)
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert type(build_parallel(None, (-1,))) is type(build_parallel(None, (1,))) is Parallel
    several = build_parallel(None, (1, 3))
    assert current == [torch.device("cuda:1")] * 2  # no other GPU is touched
    assert isinstance(several, SeveralGPUs)
    assert (several.device, several.gpuids, several.world_size) == (torch.device("cuda:1"), [1, 3], 1)
    monkeypatch.setenv("RANK", "1")
    assert type(build_parallel(None, (-1,), alone=True)) is Parallel


needs_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gpu_computes_the_gradient_of_the_cpu(case):
    batch, gradients = small.batch_of(0, torch.float64, size=BATCH), []
    for device in map(torch.device, ("cuda", "cpu")):
        training = build(case, Parallel(device)).begin_training("student", small.classes_of(0), WEIGHTS)
        training.train_step(*(part.to(device) for part in batch))
        gradients.append([parameter.grad.cpu() for parameter in training.parameters])
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-9)


@pytest.mark.multi_gpu
@needs_gpus
@pytest.mark.parametrize("case", CASES, ids=str)
def test_several_gpus_compute_the_gradient_of_one(case):
    assert compare(case, SeveralGPUs((0, 1)))[0] < 1e-9


@pytest.mark.multi_gpu
@needs_gpus
def test_several_gpus_count_the_same_answers_and_serve_several_processes():
    assert_same_counts(SeveralGPUs((0, 1)), Parallel(torch.device("cuda", 0)))
    assert_equal_gradients(2, CASES, 2, "cuda")
