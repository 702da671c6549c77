"""A batch computed in parts is the whole batch: what DataParallel, several processes and accumulation rely on."""

from __future__ import annotations

import pytest
import torch

from learners.distillers import DISTILLERS
from models.prompts import PROMPTS
from tests.learners import small
from tests.learners.small import batch_of, classes_of

PAIRS = [(learner, method) for learner in PROMPTS for method in DISTILLERS]
PHASES = [
    (*pair, phase) for pair in PAIRS for phase in ("teacher", "student")
    if phase == "student" or DISTILLERS[pair[1]].needs_teacher
]  # fmt: skip
LARGE = 8


def gradients(phase) -> list[torch.Tensor]:
    return [p.grad.clone() for p in phase.parameters]


def begin(learner_name: str, kd_method: str, phase: str, **options):
    """The second task, in which past components, heads and a trained teacher matter."""
    prompt_param = (7, 4, 0.1) if learner_name == "CODAPrompt" else None
    learner = small.learner(
        learner_name, kd_method, prompt_param=prompt_param, dtype=torch.float64, aux_loss_scale=2.0, **options
    )
    learner.begin_task(1)
    return learner.begin_phase(phase, classes_of(1))


def assert_close(one: list[torch.Tensor], other: list[torch.Tensor]) -> None:
    for x, y in zip(one, other, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("learner_name", "kd_method", "phase"), PHASES)
def test_replicas_of_data_parallel(learner_name, kd_method, phase, replicas=4):
    """DataParallel by hand: scatter, the step on every part, gather with ``torch.cat``, mean, one backward."""
    whole = begin(learner_name, kd_method, phase)
    images, targets = batch_of(1, torch.float64, size=LARGE)
    expected = whole.step(images, targets, whole.classes)
    expected["loss"].mean().backward()

    parts = begin(learner_name, kd_method, phase)
    outputs = [
        parts.step(some_images, some_targets, parts.classes)
        for some_images, some_targets in zip(images.chunk(replicas), targets.chunk(replicas), strict=True)
    ]
    gathered = {name: torch.cat([output[name] for output in outputs]) for name in outputs[0]}
    assert all(value.shape == (replicas,) for value in gathered.values())
    gathered["loss"].mean().backward()

    assert gathered.keys() == expected.keys()
    assert gathered["correct"].sum() == expected["correct"]
    for name in expected.keys() - {"correct"}:
        torch.testing.assert_close(gathered[name].mean(), expected[name][0], rtol=1e-9, atol=1e-9)
    assert_close(gradients(parts), gradients(whole))


@pytest.mark.parametrize(("learner_name", "kd_method", "phase"), PHASES)
def test_accumulation(learner_name, kd_method, phase, accumulate=2):
    whole = begin(learner_name, kd_method, phase)
    parts = begin(learner_name, kd_method, phase, accumulate=accumulate)
    batch = batch_of(1, torch.float64, size=LARGE)
    expected, result = whole.train_step(*batch), parts.train_step(*batch)
    assert result.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(result[name].double(), expected[name].double(), rtol=1e-6, atol=1e-9)
    assert_close(gradients(parts), gradients(whole))


def test_parts_of_unequal_size_are_refused(accumulate=3):
    """The mean of their means would not be the mean of the batch."""
    phase = begin("L2P", "KD", "student", accumulate=accumulate)
    before = small.snapshot(phase.step)
    with pytest.raises(ValueError, match="8 images cannot be cut into 3 equal parts"):
        phase.train_step(*batch_of(1, torch.float64, size=LARGE))
    assert not small.changed(phase.step, before)


@pytest.mark.parametrize(("learner_name", "kd_method"), PAIRS)
def test_evaluation_in_parts(learner_name, kd_method):
    learner = small.learner(learner_name, kd_method, dtype=torch.float64)
    images, targets = batch_of(0, torch.float64, size=LARGE)
    step = learner.eval_step()
    whole = step(images, targets, 2)
    halves = [step(*part, 2) for part in zip(images.chunk(2), targets.chunk(2), strict=True)]
    for role, correct in whole.items():
        assert correct == sum(half[role] for half in halves)
