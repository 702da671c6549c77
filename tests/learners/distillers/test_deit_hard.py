"""DeiT's hard distillation by hand; test_contract.py has what all methods share."""

import torch

from dataloaders.tasks import ClassRange
from learners.distillers import DISTILLERS
from learners.distillers.base import DistillDims
from models.prompted_model import ModelOutput
from utils.config import DistillConfig


def test_the_token_learns_the_teachers_best_class_of_the_task():
    distiller = DISTILLERS["DeiT-hard"].build(DistillConfig("DeiT-hard", alpha=0.25), DistillDims(2, 2, 3, 3, 4))
    assert {name for name, _ in distiller.named_parameters()} == {"kd_prompt.kd_p_0", "kd_last.weight", "kd_last.bias"}
    with torch.no_grad():
        distiller.kd_last.weight.zero_()
        distiller.kd_last.bias.copy_(torch.tensor([9.0, 9.0, 0.0, 2.0]).log1p())
    student = ModelOutput(torch.zeros(1, 4), torch.zeros(1, 2), torch.zeros(1, 1, 2), (), torch.zeros(()))
    teacher = student._replace(logits=torch.tensor([[9.0, 0.0, 1.0, 5.0]]))  # class 0 is of a past task
    terms = distiller(student, teacher, torch.tensor([2]), ClassRange(2, 4))
    torch.testing.assert_close(terms["distill"], -0.25 * torch.tensor(3 / 4).log())
