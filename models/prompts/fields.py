"""Rules for the values of ``--prompt_param``, which the PROMPTS table puts together.

Each rule turns one number into one keyword of a pool's constructor, or says what is wrong with it.
Reading them imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Field:
    """One value of ``--prompt_param``.

    Attributes:
        name: the keyword of the pool's constructor that receives the value.
        label: what messages and ``--help`` call it.
    """

    name: str
    label: str

    def rule(self) -> str:
        """The allowed values, as they stand in ``--help``."""
        raise NotImplementedError

    def parse(self, value: float, num_tasks: int | None) -> Any:
        """The constructor's value.

        Args:
            value: the number from the command line.
            num_tasks: number of tasks T of the run; None while it is unknown, which skips what needs it.

        Raises:
            ValueError: the value is not allowed; the message says what is.
        """
        raise NotImplementedError

    def whole(self, value: float) -> int:
        """``value`` as an int (raises ValueError when it is not a whole number)."""
        if not math.isfinite(value) or value != int(value):
            raise ValueError(f"{self.label} must be a whole number, not {value:g}")
        return int(value)


@dataclass(frozen=True)
class PoolSize(Field):
    """A number of pool entries: at least ``minimum`` and, with ``per_task``, one for each task."""

    minimum: int = 1
    per_task: bool = False

    def rule(self) -> str:
        return "at least the number of tasks" if self.per_task else f"at least {self.minimum}"

    def parse(self, value: float, num_tasks: int | None) -> int:
        size = self.whole(value)
        if size < self.minimum:
            raise ValueError(f"{self.label} must be at least {self.minimum}, not {size}")
        if self.per_task and num_tasks is not None and size < num_tasks:
            raise ValueError(
                f"{self.label} must be at least the number of tasks, {num_tasks}, not {size}"
                " (enlarge it, or make other_split_size larger)"
            )
        return size


@dataclass(frozen=True)
class EvenLength(Field):
    """A prompt length: its first half becomes keys, its second half values, so it must be even."""

    def rule(self) -> str:
        return "even, at least 2"

    def parse(self, value: float, num_tasks: int | None) -> int:
        length = self.whole(value)
        if length < 2 or length % 2:
            nearest = max(2, length + 1 if length % 2 else length)
            raise ValueError(
                f"{self.label} must be even and at least 2 (one half keys, one half values), not {length};"
                f" use for example {nearest}"
            )
        return length


@dataclass(frozen=True)
class Weight(Field):
    """The weight of a loss term: a finite number, 0 or more."""

    def rule(self) -> str:
        return "0 or more"

    def parse(self, value: float, num_tasks: int | None) -> float:
        if not math.isfinite(value) or value < 0:
            raise ValueError(f"{self.label} must be 0 or more, not {value:g}")
        return float(value)


@dataclass(frozen=True)
class OneOf(Field):
    """A number that stands for a setting: ``choices`` maps it to the constructor's value."""

    choices: Mapping[int, Any]
    meaning: str

    def rule(self) -> str:
        return self.meaning

    def parse(self, value: float, num_tasks: int | None) -> Any:
        if value not in self.choices:
            raise ValueError(f"{self.label} must be {self.meaning}, not {value:g}")
        return self.choices[value]
