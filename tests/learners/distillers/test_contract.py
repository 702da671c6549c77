"""The contract of every entry of the DISTILLERS table; a new method is tested without a line here."""

import re

import pytest
import torch
import torch.nn.functional as F

from dataloaders.tasks import ClassRange
from learners.distillers import DISTILLERS
from learners.distillers.base import DistillDims, Distiller, kd_loss, task_cross_entropy
from models.prompted_model import ModelOutput
from utils.config import DistillConfig

CLASSES = 6
CURRENT = ClassRange(2, 5)
TARGETS = torch.tensor([2, 4, 3, 4])
TOKENS = 5
# Names of the original's checkpoints, which its five methods keep.
ORIGINAL = ("KD_Token", "KD", "DKD", "FitNets", "ReviewKD")
NAMES = re.compile(r"kd_last\.|kd_prompt\.kd_p_\d+|project_t_s\.proj\.|ReviewKD_layers\.abfs\.\d+\.(proj|norm)[12z]\.")
TAUGHT = [name for name in DISTILLERS if DISTILLERS[name].needs_teacher]


def build(name: str, *, alpha: float = 0.5, depths: tuple[int, int] = (3, 3)) -> Distiller:
    """A method for models of width 12 and 8 and these depths, teacher first."""
    torch.manual_seed(0)
    dims = DistillDims(8, 12, depths[1], depths[0], CLASSES)
    return DISTILLERS[name].build(DistillConfig(name, (depths[1], 4), alpha), dims)


def output(dim: int, depth: int, seed: int) -> ModelOutput:
    """A model's output for four images."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, requires_grad=True)

    blocks = tuple(draw(4, TOKENS, dim) for _ in range(depth))
    return ModelOutput(draw(4, CLASSES), draw(4, dim), draw(4, 1, dim), blocks, torch.zeros(()))


def terms_of(name: str, **options) -> tuple[Distiller, ModelOutput, ModelOutput, dict[str, torch.Tensor]]:
    distiller = build(name, **options)
    depths = options.get("depths", (3, 3))
    student, teacher = output(8, depths[1], 1), output(12, depths[0], 2)
    return distiller, student, teacher, distiller(student, teacher, TARGETS, CURRENT)


@pytest.mark.parametrize("depths", [(3, 3), (24, 3), (24, 24)])
@pytest.mark.parametrize("name", DISTILLERS)
def test_outputs_at_every_depth(name, depths):
    distiller, student, _, terms = terms_of(name, depths=depths)
    assert "ce" in terms
    assert all(term.shape == () and term.isfinite() for term in terms.values())
    assert distiller.predict(student).shape == (4, CLASSES)
    assert name not in ORIGINAL or all(NAMES.match(key) for key in distiller.state_dict())
    suffixes, extra_tokens = distiller.student_inputs()
    if suffixes is not None:
        assert len(suffixes) == depths[1]
        assert all(s is None or (s.key.shape == s.value.shape and s.key.shape[2] == 8) for s in suffixes)
    if extra_tokens is not None:
        assert extra_tokens.dim() == 2 and extra_tokens.shape[1] == 8


@pytest.mark.parametrize("name", DISTILLERS)
def test_only_the_columns_of_the_task_compete(name):
    """No loss depends on logits of other classes, of either model, and none moves them."""
    distiller, student, teacher, terms = terms_of(name)
    sum(terms.values()).backward()
    assert not student.logits.grad[:, [0, 1, 5]].any()
    others = torch.ones(4, CLASSES)
    others[:, CURRENT.start : CURRENT.stop] = 0
    moved = [x._replace(logits=x.logits + 9 * others) for x in (student, teacher)]
    for key, term in distiller(*moved, TARGETS, CURRENT).items():
        torch.testing.assert_close(term, terms[key])


@pytest.mark.parametrize("name", DISTILLERS)
def test_alpha_zero_is_plain_cross_entropy(name):
    _, student, _, terms = terms_of(name, alpha=0.0)
    expected = F.cross_entropy(student.logits[:, CURRENT.start : CURRENT.stop], TARGETS - CURRENT.start)
    torch.testing.assert_close(terms["ce"], expected)
    assert terms.get("distill", torch.zeros(())) == 0


@pytest.mark.parametrize("name", [name for name in TAUGHT if DISTILLERS[name].load().compares_logits])
def test_equal_logits_distill_nothing(name):
    """All methods that say so of the class head; a method with another head compares that one."""
    distiller, student, teacher, _ = terms_of(name)
    equal = teacher._replace(logits=distiller_logits(distiller, student).detach())
    assert distiller(student, equal, TARGETS, CURRENT)["distill"].abs() < 1e-6


def distiller_logits(distiller: Distiller, student: ModelOutput) -> torch.Tensor:
    """The student's logits that are distilled: what is left of its answer beside the class head's share."""
    answer = distiller.predict(student)
    if torch.equal(answer, student.logits):
        return answer
    return (answer - (1 - distiller.alpha) * student.logits) / distiller.alpha


@pytest.mark.parametrize("name", DISTILLERS)
def test_class_weights_weigh_the_cross_entropy_alone(name):
    distiller, student, teacher, terms = terms_of(name)
    weighted = distiller(student, teacher, TARGETS, CURRENT, torch.full((CLASSES,), 3.0))
    torch.testing.assert_close(weighted, terms | {"ce": 3 * terms["ce"]})


@pytest.mark.parametrize("name", DISTILLERS)
def test_half_precision_outputs_give_losses_in_float32(name):
    distiller, student, teacher, terms = terms_of(name)
    half = [output._replace(logits=output.logits.bfloat16()) for output in (student, teacher)]
    for key, term in distiller(*half, TARGETS, CURRENT).items():
        assert term.dtype == torch.float32
        torch.testing.assert_close(term, terms[key], rtol=0.05, atol=0.02)


def test_cross_entropy_by_hand():
    logits = torch.tensor([[9.0, 1.0, 1.0, 9.0], [9.0, 2.0, 2.0, 9.0]])
    loss = task_cross_entropy(logits, torch.tensor([1, 2]), ClassRange(1, 3))
    torch.testing.assert_close(loss, torch.tensor(2.0).log())
    weights = torch.tensor([0.0, 1.0, 3.0, 0.0])
    weighted = task_cross_entropy(logits, torch.tensor([1, 2]), ClassRange(1, 3), weights)
    torch.testing.assert_close(weighted, 2 * torch.tensor(2.0).log())


def test_kd_by_hand():
    """Teacher (2/3, 1/3) and student (1/2, 1/2) at temperature 2: 4 (2/3 ln 4/3 + 1/3 ln 2/3)."""
    teacher = 2 * torch.tensor([[2.0, 1.0]]).log()
    loss = kd_loss(torch.zeros(1, 2), teacher, temperature=2.0)
    torch.testing.assert_close(loss, torch.tensor(4 * (2 / 3 * 0.2876821 - 1 / 3 * 0.4054651)))
    torch.testing.assert_close(kd_loss(torch.zeros(3, 2), teacher.expand(3, 2), temperature=2.0), loss)
