"""CODA-Prompt (Smith et al., CVPR 2023, arXiv 2211.13218): prompts as weighted sums of components."""

import torch
from torch import Tensor, nn

from models.prompts.base import PromptDims, PromptOutput, PromptPool
from models.vit import LayerPrompt, split_prompt
from utils.config import ConfigError


class CODAPrompt(PromptPool):
    """A pool of M components on blocks 0 to 4, of which each task adds M // T (arXiv 2211.13218, section 4).

    Parameters per block l: M = ``pool`` components ``e_p_l`` [M, length, D], half keys and half values, with keys
    ``e_k_l`` [M, Dq] and attention ``e_a_l`` [M, Dq]. ``ortho_weight`` is that of the orthogonality penalty.
    """

    def __init__(self, *, pool: int, length: int, ortho_weight: float, dims: PromptDims) -> None:
        super().__init__(dims)
        self.per_task = pool // dims.num_tasks
        self.ortho_weight = ortho_weight
        self.layers = self.blocks(range(5))
        for layer in self.layers:
            self.register_parameter(f"e_p_{layer}", nn.Parameter(torch.zeros(pool, length, dims.embed_dim)))
            self.register_parameter(f"e_k_{layer}", nn.Parameter(torch.zeros(pool, dims.query_dim)))
            self.register_parameter(f"e_a_{layer}", nn.Parameter(torch.zeros(pool, dims.query_dim)))
        self.begin_task(0, torch.default_generator)

    @torch.no_grad()
    def begin_task(self, task: int, generator: torch.Generator) -> None:
        """Grow the pool: draw new components for the task, orthogonal to all earlier ones."""
        super().begin_task(task, generator)
        start = task * self.per_task
        for layer in self.layers:
            for parameter in self._tensors(layer):
                draws = torch.randn(self.per_task, parameter[0].numel(), generator=generator)
                parameter.copy_(gram_schmidt_growth(parameter.cpu(), draws, start))

    def forward(self, query: Tensor) -> PromptOutput:
        prompts = self.no_prompts()
        loss = query.new_zeros(())
        for layer in self.layers:
            keys, attention, p = self._visible(layer)
            weights = component_weights(query, keys, attention)  # [B, f]
            prompt = (weights @ p.flatten(1)).unflatten(1, p.shape[1:])  # [B, length, D]
            prompts[layer] = LayerPrompt(prefix=split_prompt(prompt))
            if self.training and self.ortho_weight > 0:
                loss = loss + self.ortho_weight * sum(orthogonality(x) for x in (keys, attention, p.flatten(1)))
        return PromptOutput(prompts, loss)

    def usage(self, query: Tensor) -> dict[str, Tensor]:
        """Sum each component's weight over the batch, per block."""
        result = {}
        for layer in self.layers:
            keys, attention, _ = self._visible(layer)
            total = query.new_zeros(len(getattr(self, f"e_k_{layer}")))
            total[: len(keys)] = component_weights(query, keys, attention).sum(0)
            result[f"block {layer}"] = total
        return result

    def _tensors(self, layer: int) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
        # The order, keys before attention before components, is the order of the random draws.
        return tuple(getattr(self, f"e_{kind}_{layer}") for kind in ("k", "a", "p"))

    def _visible(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, attention and components up to the current task; past ones without gradient in training."""
        start = self.task * self.per_task
        stop = start + self.per_task
        if not self.training:
            return tuple(x[:stop] for x in self._tensors(layer))
        return tuple(torch.cat([x[:start].detach(), x[start:stop]]) for x in self._tensors(layer))


def component_weights(query: Tensor, keys: Tensor, attention: Tensor) -> Tensor:
    """``w[b, m] = cos(q_b * A_m, K_m)``, arXiv 2211.13218 eq. 5, as two matrix products.

    Queries [B, D], keys K [M, D] and attention A [M, D] give [B, M]. No softmax is applied.
    """
    unit_keys = nn.functional.normalize(keys, dim=1)
    # cos(q * A, K) = sum_d q A K / (|q * A| |K|): no [B, M, D] tensor is needed.
    dot = query @ (attention * unit_keys).T
    squared_norm = query.square() @ attention.square().T
    return dot / squared_norm.clamp_min(1e-24).sqrt()


def orthogonality(x: Tensor) -> Tensor:
    """``mean((X X^T - I)^2)`` of rows X [M, D], arXiv 2211.13218 eq. 7."""
    return (x @ x.T - torch.eye(len(x), device=x.device, dtype=x.dtype)).square().mean()


def gram_schmidt_growth(before: Tensor, draws: Tensor, start: int) -> Tensor:
    """Make new components orthogonal to all earlier ones by classical Gram-Schmidt.

    Rows before ``start`` stay the same. Row start + i becomes ``draws[i]`` minus its projections on all earlier
    rows, each computed from the draw itself. Learned rows are neither orthogonal nor of unit length, and the new
    rows are normalised only after all of them are made. Rows past the new ones become 0. Raises ConfigError if an
    earlier row is (nearly) zero, so that nothing can be projected on it.

    Args:
        before: [M, ...], flattened to [M, width].
        draws: standard-normal vectors, [new, width].
        start: index of the first new row.
    """
    stop = start + len(draws)
    rows = torch.zeros(len(before), draws.shape[1], dtype=torch.float64)
    rows[:start] = before.flatten(1)[:start]
    squared_norms = rows.square().sum(1)
    for index, draw in enumerate(draws.double(), start):
        if index and squared_norms[:index].min() < 1e-8:
            zero = int(squared_norms[:index].argmin())
            raise ConfigError(
                f"component {zero} of the prompt pool has become zero (squared norm {squared_norms[zero]:.1e}), "
                f"or the pool holds more components per task than the width {draws.shape[1]} has dimensions: "
                "no new component can be made orthogonal to it. Use a smaller pool or learning rate."
            )
        coefficients = rows[:index] @ draw / squared_norms[:index]
        rows[index] = draw - coefficients @ rows[:index]
        squared_norms[index] = rows[index].square().sum()
    rows[start:stop] = nn.functional.normalize(rows[start:stop], dim=1)
    return rows.view_as(before).to(before.dtype)
