"""DualPrompt (Wang et al., ECCV 2022, arXiv 2204.04799): general and expert prompts."""

from torch import Tensor

from models.prompts.base import PromptDims, PromptOutput, PromptPool, cosine_similarity, uniform_parameter
from models.vit import LayerPrompt, split_prompt


class DualPrompt(PromptPool):
    """G prompts on blocks 0 and 1, the same for every image; one E prompt per task on blocks 2 to 4.

    Parameters: G prompts ``g_p_l`` [g_length, D]; M = ``pool`` E prompts (at least one for each task) ``e_p_l``
    [M, e_length, D] and their keys ``e_k_l`` [M, Dq]. A prompt is half keys and half values.
    """

    per_task = 1

    def __init__(self, *, pool: int, e_length: int, g_length: int, dims: PromptDims) -> None:
        super().__init__(dims)
        self.g_layers = self.blocks(range(2))
        self.e_layers = self.blocks(range(2, 5))
        for layer in self.g_layers:
            self.register_parameter(f"g_p_{layer}", uniform_parameter(g_length, dims.embed_dim))
        for layer in self.e_layers:
            self.register_parameter(f"e_p_{layer}", uniform_parameter(pool, e_length, dims.embed_dim))
            self.register_parameter(f"e_k_{layer}", uniform_parameter(pool, dims.query_dim))

    def forward(self, query: Tensor) -> PromptOutput:
        prompts = self.no_prompts()
        loss = query.new_zeros(())
        for layer in self.g_layers:
            prompts[layer] = LayerPrompt(prefix=split_prompt(getattr(self, f"g_p_{layer}")[None]))
        for layer in self.e_layers:
            similarity = self._similarity(query, layer)
            e_p = getattr(self, f"e_p_{layer}")
            if self.training:
                prompt = e_p[self.task][None]  # the task is known in training
                loss = loss + (1 - similarity[:, self.task]).mean()
            else:
                prompt = e_p[similarity.argmax(1)]
            prompts[layer] = LayerPrompt(prefix=split_prompt(prompt))
        return PromptOutput(prompts, loss)

    def usage(self, query: Tensor) -> dict[str, Tensor]:
        """Count the images that choose each E prompt, per block."""
        found = {f"block {layer}": self._similarity(query, layer) for layer in self.e_layers}
        return {name: x.argmax(1).bincount(minlength=x.shape[1]).float() for name, x in found.items()}

    def _similarity(self, query: Tensor, layer: int) -> Tensor:
        return cosine_similarity(query, getattr(self, f"e_k_{layer}"))
