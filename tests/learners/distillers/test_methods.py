"""The KD methods by hand; test_contract.py has what they share, tests/test_golden.py the authors' values."""

import dataclasses

import pytest
import torch

from dataloaders.tasks import ClassRange
from learners.distillers import DISTILLERS
from learners.distillers.base import DistillDims, Distiller
from learners.distillers.dkd import dkd_loss
from learners.distillers.kd_token import KDToken
from models.prompted_model import ModelOutput
from utils.config import DistillConfig

DIMS = DistillDims(student_dim=4, teacher_dim=6, student_depth=2, teacher_depth=3, num_classes=5)
ALL = ClassRange(0, 5)


def settings(alpha: float = 0.5, layers: int = 2, temperature: float = 2.0) -> DistillConfig:
    return DistillConfig("", (layers, 4), alpha, temperature)


def output(dim: int = 4, depth: int = 2) -> ModelOutput:
    blocks = tuple(torch.randn(3, 5, dim) for _ in range(depth))
    return ModelOutput(torch.randn(3, 5), torch.randn(3, dim), torch.randn(3, 1, dim), blocks, torch.zeros(()))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def dkd_by_probabilities(student, teacher, target, alpha, beta, temperature):
    """The paper's definition, image by image."""
    total = 0.0
    for s, t, y in zip(student, teacher, target, strict=True):
        p, q = (torch.softmax(x.double() / temperature, 0) for x in (t, s))
        others = [i for i in range(len(s)) if i != y]
        tckd = p[y] * (p[y] / q[y]).log() + (1 - p[y]) * ((1 - p[y]) / (1 - q[y])).log()
        p_others, q_others = p[others] / (1 - p[y]), q[others] / (1 - q[y])
        total += alpha * tckd + beta * (p_others * (p_others / q_others).log()).sum()
    return total * temperature**2 / len(target)


def test_dkd_is_its_definition():
    student, teacher, target = 3 * torch.randn(4, 5), 3 * torch.randn(4, 5), torch.tensor([0, 4, 2, 2])
    for weights in ((1.0, 4.0), (1.0, 0.0), (0.0, 1.0)):
        loss = dkd_loss(student, teacher, target, alpha=weights[0], beta=weights[1], temperature=4.0)
        expected = dkd_by_probabilities(student, teacher, target, *weights, 4.0)
        torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("logits", [[500.0, 0.0, -500.0], [3.0]])
def test_dkd_stays_finite_where_a_probability_vanishes_or_is_the_only_one(logits):
    student = torch.tensor([logits], requires_grad=True)
    loss = dkd_loss(student, -student.detach(), torch.tensor([0]), alpha=1.0, beta=4.0, temperature=4.0)
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all() and (loss == 0) == (len(logits) == 1)


def test_dkd_has_a_temperature_of_its_own():
    student, teacher, targets = output(), output(6, 3), torch.tensor([0, 1, 2])
    one, two = (DISTILLERS["DKD"].build(settings(temperature=temperature), DIMS) for temperature in (1.0, 2.0))
    assert one(student, teacher, targets, ALL)["distill"] == two(student, teacher, targets, ALL)["distill"]


def test_fitnets_by_hand():
    """A projection to 0.5 everywhere, a teacher of 1.5: MSE 1, weight 0.1, tokens and channels averaged."""
    distiller = DISTILLERS["FitNets"].build(settings(), DIMS)
    with torch.no_grad():
        distiller.project_t_s.proj.weight.zero_()
        distiller.project_t_s.proj.bias.fill_(0.5)
    teacher = output(6, 3)
    teacher.blocks[-1].fill_(1.5)
    terms = distiller(output(), teacher, torch.tensor([0, 1, 2]), ALL)
    torch.testing.assert_close(terms["feature"], torch.tensor(0.1))


def test_parameters_of_a_method_are_its_own():
    """A weight of 0.3 instead of 0.1, as the mapping of a YAML file and as a word of the command line."""
    torch.manual_seed(0)
    config, teacher, student = settings(), output(6, 3), output()
    losses = []
    for param in ({"weight": 0.1}, {"weight": 0.3}, {"weight": "0.3"}):
        torch.manual_seed(0)
        distiller = DISTILLERS["FitNets"].build(dataclasses.replace(config, param=param), DIMS)
        losses.append(distiller(student, teacher, torch.tensor([0, 1, 2]), ALL)["feature"])
    torch.testing.assert_close(losses[1], 3 * losses[0])
    assert losses[1] == losses[2]


def test_reviewkd_by_hand():
    """Features of 0.5 everywhere against a teacher of 1.5 and 2.5 in its last blocks: 0.2 * (1 + 4) / 2."""
    distiller = DISTILLERS["ReviewKD"].build(settings(), DIMS)
    with torch.no_grad():
        for fusion in distiller.ReviewKD_layers.abfs:
            fusion.proj2.weight.zero_()
            fusion.proj2.bias.fill_(0.5)
    teacher = output(6, 3)
    for block, value in zip(teacher.blocks, (100.0, 1.5, 2.5), strict=True):
        block.fill_(value)
    terms = distiller(output(), teacher, torch.tensor([0, 1, 2]), ALL)
    torch.testing.assert_close(terms["feature"], torch.tensor(0.5))


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
def test_kd_token_mixes_both_heads_in_its_answer(alpha):
    distiller = KDToken(settings(alpha), DIMS)
    with torch.no_grad():
        distiller.kd_last.weight.zero_()
        distiller.kd_last.bias.fill_(3.0)
    student = output()._replace(logits=torch.ones(3, 5))
    torch.testing.assert_close(distiller.predict(student), torch.full((3, 5), (1 - alpha) + 3 * alpha))


def test_kd_prompts_sit_on_blocks_one_and_up():
    distiller = KDToken(settings(layers=3), DIMS._replace(student_depth=5))
    suffixes, extra_tokens = distiller.student_inputs()
    assert [suffix is not None for suffix in suffixes] == [False, True, True, False, False]
    assert extra_tokens is distiller.kd_prompt.kd_p_0
    prompt = distiller.kd_prompt.kd_p_1
    assert torch.equal(suffixes[1].key[0], prompt[:2]) and torch.equal(suffixes[1].value[0], prompt[2:])
    assert all(0 <= p.min() < p.max() < 1 for p in distiller.kd_prompt.parameters())


def test_without_distillation_cross_entropy_counts_fully():
    student, targets = output(), torch.tensor([0, 1, 2])
    terms = Distiller(settings(alpha=0.9), DIMS)(student, None, targets, ALL)
    assert terms.keys() == {"ce"}
    torch.testing.assert_close(terms["ce"], torch.nn.functional.cross_entropy(student.logits, targets))
