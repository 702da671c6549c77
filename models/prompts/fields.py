"""Rules for the values of ``--prompt_param``, which the PROMPTS table puts together; needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from utils.config import Type


@dataclass(frozen=True)
class Field:
    """One value of ``--prompt_param``, a finite number.

    Attributes:
        name: the keyword of the pool's constructor that receives the value.
        label: its name in messages and ``--help``.
    """

    name: str
    label: str

    def rule(self) -> str:
        """The allowed values in words, for ``--help``."""
        raise NotImplementedError

    def parse(self, value: float, num_tasks: int | None) -> Any:
        """The constructor's value for ``value`` in a run of T = ``num_tasks`` (None while unknown: not checked).

        Raises:
            ValueError: the value is not allowed; the message says which values are.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Count(Field):
    """A whole number of at least ``minimum``; with ``per_task``, of at least the number of tasks as well."""

    minimum: int = 1
    even: bool = False
    per_task: bool = False

    def rule(self) -> str:
        if self.per_task:
            return "at least the number of tasks"
        return f"{'even, ' if self.even else ''}at least {self.minimum}"

    def parse(self, value: float, num_tasks: int | None) -> int:
        if value != int(value):
            raise ValueError(f"{self.label} must be a whole number, not {value:g}")
        count = int(value)
        if count < self.minimum or (self.even and count % 2):
            nearest = max(self.minimum, count + count % 2)
            raise ValueError(f"{self.label} must be {self.rule()}, not {count}; use for example {nearest}")
        if self.per_task and num_tasks is not None and count < num_tasks:
            must = f"must be at least the number of tasks, {num_tasks}, not {count}"
            raise ValueError(f"{self.label} {must} (enlarge it, or make other_split_size larger)")
        return count


@dataclass(frozen=True)
class Number(Field):
    """A number of a type of utils.config."""

    type: Type

    def rule(self) -> str:
        return self.type.allowed

    def parse(self, value: float, num_tasks: int | None) -> float:
        if self.type.parse(value) is None:
            raise ValueError(f"{self.label} must be {self.rule()}, not {value:g}")
        return float(value)


@dataclass(frozen=True)
class OneOf(Field):
    """A number that selects a setting: ``choices`` maps it to the constructor's value."""

    choices: Mapping[int, Any]
    meaning: str

    def rule(self) -> str:
        return self.meaning

    def parse(self, value: float, num_tasks: int | None) -> Any:
        if value not in self.choices:
            raise ValueError(f"{self.label} must be {self.meaning}, not {value:g}")
        return self.choices[value]
