"""L2P (Wang et al., CVPR 2022, arXiv 2112.08654): the five best prompts of a shared pool."""

import torch
import torch.nn.functional as F
from torch import Tensor

from models.prompts.base import PromptDims, PromptOutput, PromptPool, cosine_similarity, uniform_parameter
from models.vit import KV, LayerPrompt, split_prompt


class L2P(PromptPool):
    """E prompts on block 0, or on blocks 0 to 4 when ``deep``; the 5 best keys are used together.

    Parameters: M = ``pool`` prompts (at least 5) ``e_p_l`` [M, length, D], half keys and half values; their keys
    ``e_k_l`` [M, Dq].
    """

    def __init__(self, *, pool: int, length: int, deep: bool, dims: PromptDims) -> None:
        super().__init__(dims)
        self.pool = pool
        self.layers = self.blocks(range(5 if deep else 1))
        for layer in self.layers:
            self.register_parameter(f"e_p_{layer}", uniform_parameter(pool, length, dims.embed_dim))
            self.register_parameter(f"e_k_{layer}", uniform_parameter(pool, dims.query_dim))

    def forward(self, query: Tensor) -> PromptOutput:
        prompts = self.no_prompts()
        loss = query.new_zeros(())
        for layer in self.layers:
            best = self._best(query, layer)
            e_p = getattr(self, f"e_p_{layer}")
            # Not e_p[best.indices], whose gradient adds up the uses of a prompt in no fixed order.
            chosen = F.embedding(best.indices, e_p.flatten(1)).unflatten(2, e_p.shape[1:])  # [B, 5, length, D]
            key, value = split_prompt(chosen)
            prompts[layer] = LayerPrompt(prefix=KV(key.flatten(1, 2), value.flatten(1, 2)))
            if self.training:
                loss = loss + (1 - best.values).sum(1).mean()  # arXiv 2112.08654 eq. 5
        return PromptOutput(prompts, loss)

    def usage(self, query: Tensor) -> dict[str, Tensor]:
        """Count the images that choose each prompt, per block; an image chooses five."""
        chosen = {f"block {layer}": self._best(query, layer).indices.flatten() for layer in self.layers}
        return {name: x.bincount(minlength=self.pool).float() for name, x in chosen.items()}

    def _best(self, query: Tensor, layer: int) -> torch.return_types.topk:
        """Similarities and indices of the five nearest keys, [B, 5] each."""
        return cosine_similarity(query, getattr(self, f"e_k_{layer}")).topk(5, dim=1)
