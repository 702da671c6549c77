"""Backbone, prompt pool and head: the model that teacher and student both are."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from models.prompts.base import PromptPool
from models.vit import KV, PromptedViT


class StudentInputs(NamedTuple):
    """Inputs from a KD method to the student: keys and values appended in each block, extra tokens [T, D]."""

    suffixes: Sequence[KV | None] | None = None
    extra_tokens: Tensor | None = None


class ModelOutput(NamedTuple):
    """Result of a prompted model."""

    logits: Tensor  # of the class token's head, [B, C]
    features: Tensor  # final-norm class token, [B, D]
    extra: Tensor  # final-norm extra tokens, [B, T, D]
    blocks: tuple[Tensor, ...]  # outputs of all blocks, L x [B, N + T, D]; () unless asked for
    prompt_loss: Tensor  # the pool's loss, a scalar


class PromptedModel(nn.Module):
    """A frozen ViT with a prompt pool (``prompt``) and the pool's head over all classes (``last``).

    Args:
        vit: several models may share one.
        num_classes: C, all classes of all tasks.
    """

    def __init__(self, vit: PromptedViT, prompt: PromptPool, num_classes: int) -> None:
        super().__init__()
        self.vit = vit
        self.prompt = prompt
        self.last = prompt.make_head(vit.embed_dim, num_classes)

    def forward(
        self, tokens: Tensor, query: Tensor | None, inputs: StudentInputs | None = None, *, return_blocks: bool = False
    ) -> ModelOutput:
        """Classify embedded images.

        Args:
            tokens: ``vit.embed(images)``, [B, N, D].
            query: selects the prompts, [B, Dq]; None for a pool that needs none.
            inputs: what a KD method injects.
            return_blocks: also return the outputs of all blocks.
        """
        prompts, prompt_loss = self.prompt(query)
        inputs = inputs or StudentInputs()
        if inputs.suffixes is not None:
            prompts = [each._replace(suffix=suffix) for each, suffix in zip(prompts, inputs.suffixes, strict=True)]
        features = self.vit(tokens, prompts, inputs.extra_tokens, return_blocks=return_blocks)
        prompt_loss = features.cls.new_zeros(()) if prompt_loss is None else prompt_loss
        return ModelOutput(self.last(features.cls), features.cls, features.extra, features.blocks, prompt_loss)

    def trained_state(self) -> dict[str, Tensor]:
        """Pool and head under the original's names (``prompt.e_p_0``, ``last.weight``)."""
        return {key: value for key, value in self.state_dict().items() if not key.startswith("vit.")}

    def load_trained_state(self, state: Mapping[str, Tensor]) -> None:
        """Load what :meth:`trained_state` returned; RuntimeError if a name or shape does not fit."""
        missing, unexpected = self.load_state_dict(state, strict=False)
        missing = [key for key in missing if not key.startswith("vit.")]
        if missing or unexpected:
            raise RuntimeError(f"the state lacks {missing} and has unknown {unexpected}")
