"""Losses of an epoch, read from the device once in a while."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from learners.learner import TrainResult
from utils.parallel import Parallel

GRADIENT = "gradient"


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
        self.names: list[str] = []
        self.sums: dict[str, float] = {}
        self.correct = self.steps = self.skipped = self.images = 0
        self._pending: list[Tensor] = []
        self._pending_images = 0

    def add(self, result: TrainResult, images: int) -> None:
        """Take the result of a training step on ``images`` images (of the global batch)."""
        losses = {"loss": result.loss, **result.terms, GRADIENT: result.gradient}
        self.names = list(losses)
        self._pending.append(torch.stack([value.float() for value in (*losses.values(), result.correct)]))
        self._pending_images += images

    def read(self) -> None:
        """Fetch the pending steps.

        Raises:
            NonFiniteError: naming the first step (counted from 1) and term that is not finite.
        """
        if not self._pending:
            return
        values = self.parallel.sum(torch.stack(self._pending)).cpu().double()  # [steps, terms + 1]
        losses, correct = values[:, :-1] / self.parallel.world_size, values[:, -1]
        self._check(losses)
        # Step by step, so that the sums do not depend on when they are read.
        for row in losses.tolist():
            for name, value in zip(self.names, row, strict=True):
                skipped = name == GRADIENT and not math.isfinite(value)  # _check has let it pass
                self.skipped += skipped
                self.sums[name] = self.sums.get(name, 0.0) + (0.0 if skipped else value)
        self.correct += int(correct.sum())
        self.steps += len(values)
        self.images += self._pending_images
        self._pending, self._pending_images = [], 0

    def means(self) -> dict[str, float]:
        """Mean of each term over the steps read so far, and the training ``accuracy`` in %."""
        means = {name: total / max(self.steps, 1) for name, total in self.sums.items()}
        if self.skipped:
            updates = self.steps - self.skipped
            means[GRADIENT] = self.sums[GRADIENT] / updates if updates else math.nan
        return means | {"accuracy": 100 * self.correct / self.images if self.images else math.nan}

    def state(self) -> dict[str, Any]:
        """Everything that was read, for a resume within the epoch."""
        names = ("sums", "correct", "steps", "skipped", "images")
        return {name: getattr(self, name) for name in names}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Load the result of :meth:`state`."""
        for name, value in state.items():
            setattr(self, name, value)

    def _check(self, losses: Tensor) -> None:
        finite = losses.isfinite()
        if not self.check_gradient:
            finite[:, self.names.index(GRADIENT)] = True
        if not finite.all():
            step, term = (~finite).nonzero()[0].tolist()
            raise NonFiniteError(f"step {self.steps + step + 1}: {self.names[term]} is {losses[step, term]:g}")
