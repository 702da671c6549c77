"""Baselines without a pool: one general prompt per block, the same for all images and tasks; and no prompt."""

from models.prompts.base import PromptDims, PromptOutput, PromptPool, uniform_parameter
from models.vit import LayerPrompt, split_prompt


class OnePrompt(PromptPool):
    """Prompts ``g_p_l`` [length, D], half keys and half values, on blocks 0 to 4, without pool and query."""

    needs_query = False

    def __init__(self, *, length: int, dims: PromptDims) -> None:
        super().__init__(dims)
        self.layers = self.blocks(range(5))
        for layer in self.layers:
            self.register_parameter(f"g_p_{layer}", uniform_parameter(length, dims.embed_dim))

    def forward(self, query: None) -> PromptOutput:
        prompts = self.no_prompts()
        for layer in self.layers:
            prompts[layer] = LayerPrompt(prefix=split_prompt(getattr(self, f"g_p_{layer}")[None]))
        return PromptOutput(prompts)


class NoPrompt(PromptPool):
    """No prompts and no parameters: the head alone is trained, on the frozen backbone's features."""

    needs_query = False

    def forward(self, query: None) -> PromptOutput:
        return PromptOutput(self.no_prompts())
