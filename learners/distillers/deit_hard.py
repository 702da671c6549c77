"""DeiT's hard distillation (Touvron et al., ICML 2021, arXiv 2012.12877): a token learns the teacher's decisions."""

import dataclasses

from torch import Tensor

from dataloaders.tasks import ClassRange
from learners.distillers.base import DistillDims, task_cross_entropy
from learners.distillers.kd_token import KDToken
from models.prompted_model import ModelOutput
from utils.config import DistillConfig


class DeiTHard(KDToken):
    """``alpha * CE`` of the token's head against the teacher's best class of the task (arXiv 2012.12877, eq. 3).

    The token has no prompts (``--kd_prompt_param`` does not apply); the answer mixes both heads by alpha.
    """

    compares_logits = False

    def __init__(self, config: DistillConfig, dims: DistillDims) -> None:
        super().__init__(dataclasses.replace(config, prompt_param=(1, 0)), dims)

    def distill(self, student: ModelOutput, teacher: ModelOutput, targets: Tensor, classes: ClassRange) -> Tensor:
        decisions = teacher.logits[:, slice(*classes)].argmax(1) + classes.start
        return self.alpha * task_cross_entropy(self._kd_logits(student), decisions, classes)
