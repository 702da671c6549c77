"""Losses of an epoch, read from the device once in a while."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from learners.steps import StepResult
from utils.parallel import Parallel


class TrainingError(RuntimeError):
    """Training cannot continue; the last good state is kept."""


class NonFiniteError(TrainingError):
    """A loss, the gradient or a parameter became infinite or not a number."""


class LossMeter:
    """Means of all terms of the loss over an epoch.

    Steps are kept on the device until :meth:`read`, so that training does not wait for numbers nobody reads.

    Args:
        parallel: averages over processes.
        check_gradient: False where the loss scaling of fp16 makes an infinite gradient normal: its step is skipped,
            and left out of the gradient's mean.
    """

    def __init__(self, parallel: Parallel, *, check_gradient: bool = True) -> None:
        self.parallel = parallel
        self.check_gradient = check_gradient
        self.sums: dict[str, float] = {}
        self.correct = self.steps = self.skipped = self.images = 0
        self._pending: list[Tensor] = []

    def add(self, result: StepResult, images: int) -> None:
        """Take the result of a training step on ``images`` images (of the global batch)."""
        losses = {"loss": result.loss, **result.terms, "gradient": result.gradient}
        self.sums = self.sums or dict.fromkeys(losses, 0.0)
        self._pending.append(torch.stack([value.float() for value in (*losses.values(), result.correct)]))
        self.images += images

    def read(self) -> None:
        """Fetch the pending steps; a NonFiniteError names the first step (from 1) and term that is not finite."""
        if not self._pending:
            return
        values = self.parallel.sum(torch.stack(self._pending)).cpu().double()  # [steps, terms + 1]
        self._pending = []
        # Step by step, so that the sums do not depend on when they are read.
        for *losses, correct in values.tolist():
            self.steps += 1
            for name, total in zip(self.sums, losses, strict=True):
                value = total / self.parallel.world_size
                if math.isfinite(value):
                    self.sums[name] += value
                elif name == "gradient" and not self.check_gradient:
                    self.skipped += 1
                else:
                    raise NonFiniteError(f"step {self.steps}: {name} is {value:g}")
            self.correct += int(correct)

    def means(self) -> dict[str, float]:
        """Mean of each term, and the training ``accuracy`` in %; call :meth:`read` before."""
        means = {name: total / self.steps for name, total in self.sums.items()}
        if self.skipped:
            updates = self.steps - self.skipped
            means["gradient"] = self.sums["gradient"] / updates if updates else math.nan
        return means | {"accuracy": 100 * self.correct / self.images}

    def state(self) -> dict[str, Any]:
        """Everything that was read, for a resume within the epoch; call :meth:`read` before."""
        return {name: getattr(self, name) for name in ("sums", "correct", "steps", "skipped", "images")}

    def load_state(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state)
