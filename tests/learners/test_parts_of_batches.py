"""A batch computed in parts is the whole batch: DataParallel, several processes and accumulation rely on it."""

from __future__ import annotations

import pytest
import torch

from learners.distillers import DISTILLERS
from models.prompts import PROMPTS
from tests.learners import small
from tests.learners.small import batch_of, classes_of

PAIRS = [(learner, method) for learner in PROMPTS for method in DISTILLERS]
TRAININGS = [
    (*pair, role) for pair in PAIRS for role in ("teacher", "student") if role == "student" or pair[1] != "none"
]
LARGE = 8


def begin(learner_name: str, kd_method: str, role: str, **options):
    """The second task, in which past components, heads and a trained teacher matter."""
    prompt_param = (7, 4, 0.1) if learner_name == "CODAPrompt" else None
    learner = small.learner(
        learner_name, kd_method, prompt_param=prompt_param, dtype=torch.float64, aux_loss_scale=2.0, **options
    )
    learner.begin_task(1)
    return learner.begin_training(role, classes_of(1))


def assert_close(parts, whole) -> None:
    torch.testing.assert_close(parts, whole, rtol=1e-9, atol=1e-9)


def gradients(training) -> list[torch.Tensor]:
    return [p.grad.clone() for p in training.parameters]


@pytest.mark.parametrize(("learner_name", "kd_method", "role"), TRAININGS)
def test_replicas_of_data_parallel(learner_name, kd_method, role, replicas=4):
    """DataParallel by hand: scatter, the step on every part, gather with ``torch.cat``, mean, one backward."""
    whole = begin(learner_name, kd_method, role)
    images, targets = batch_of(1, torch.float64, size=LARGE)
    expected = whole.step(images, targets, whole.classes)
    expected.loss.mean().backward()

    parts = begin(learner_name, kd_method, role)
    chunks = zip(images.chunk(replicas), targets.chunk(replicas), strict=True)
    outputs = [parts.step(*chunk, parts.classes) for chunk in chunks]
    loss = torch.cat([output.loss for output in outputs])
    assert loss.shape == (replicas,)
    loss.mean().backward()
    assert sum(output.correct for output in outputs) == expected.correct
    assert_close(loss.mean(), expected.loss[0])
    for name, term in expected.terms.items():
        assert_close(torch.cat([output.terms[name] for output in outputs]).mean(), term[0])
    assert_close(gradients(parts), gradients(whole))


@pytest.mark.parametrize(("learner_name", "kd_method", "role"), TRAININGS)
def test_accumulation(learner_name, kd_method, role):
    batch = batch_of(1, torch.float64, size=LARGE)
    whole, parts = (begin(learner_name, kd_method, role, accumulate=number) for number in (1, 2))
    expected, result = whole.train_step(*batch), parts.train_step(*batch)
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-9, check_dtype=False)
    assert_close(gradients(parts), gradients(whole))


@pytest.mark.parametrize(("learner_name", "kd_method"), PAIRS)
def test_evaluation_in_parts(learner_name, kd_method):
    learner = small.learner(learner_name, kd_method, dtype=torch.float64)
    images, targets = batch_of(0, torch.float64, size=LARGE)
    step = learner.eval_step()
    whole = step(images, targets, 2)
    halves = [step(*part, 2) for part in zip(images.chunk(2), targets.chunk(2), strict=True)]
    for role, correct in whole.correct.items():
        assert correct == sum(half.correct[role] for half in halves)
