"""D-CDL, called KD_Token on the command line (Zhang et al. 2026, arXiv 2407.13911): a KD token and KD prompts."""

from torch import Tensor, nn

from dataloaders.tasks import ClassRange
from learners.distillers.base import DistillDims, Distiller, kd_loss
from models.prompted_model import ModelOutput, StudentInputs
from models.prompts.base import uniform_parameter
from models.vit import KV, split_prompt
from utils.config import DistillConfig


class KDPrompt(nn.Module):
    """The KD token ``kd_p_0`` [1, Ds] and KD prompts ``kd_p_l`` [length, Ds] of blocks 1 to layers - 1.

    They belong to distillation alone: all tasks share them and nothing resets them. With one layer there is only
    DeiT's distillation token. ``length`` is split evenly into keys and values.
    """

    def __init__(self, layers: int, length: int, width: int) -> None:
        super().__init__()
        self.layers = layers
        self.kd_p_0 = uniform_parameter(1, width)
        for layer in range(1, layers):
            self.register_parameter(f"kd_p_{layer}", uniform_parameter(length, width))

    def suffixes(self, depth: int) -> list[KV | None]:
        """Keys and values to append in each of ``depth`` blocks."""
        prompts = [split_prompt(getattr(self, f"kd_p_{layer}")[None]) for layer in range(1, self.layers)]
        return [None, *prompts, *[None] * (depth - self.layers)]


class KDToken(Distiller):
    """KD through a token, prompts and a head of its own; the prediction mixes both heads by alpha."""

    def __init__(self, config: DistillConfig, dims: DistillDims) -> None:
        super().__init__(config, dims)
        self.depth = dims.student_depth
        self.kd_prompt = KDPrompt(*config.prompt_param, dims.student_dim)
        self.kd_last = dims.make_head(dims.student_dim, dims.num_classes)

    def student_inputs(self) -> StudentInputs:
        return StudentInputs(self.kd_prompt.suffixes(self.depth), self.kd_prompt.kd_p_0)

    def distill(self, student: ModelOutput, teacher: ModelOutput, targets: Tensor, classes: ClassRange) -> Tensor:
        kd_logits, active = self._kd_logits(student), slice(*classes)
        return self.alpha * kd_loss(kd_logits[:, active], teacher.logits[:, active], temperature=self.temperature)

    def predict(self, student: ModelOutput) -> Tensor:
        return (1 - self.alpha) * student.logits + self.alpha * self._kd_logits(student)

    def _kd_logits(self, student: ModelOutput) -> Tensor:
        return self.kd_last(student.extra[:, 0])
