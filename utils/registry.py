"""Explicit, lazy tables of what can be chosen by name (learners, KD methods, data sets)."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar


class UnknownNameError(ValueError):
    """A name that no table entry has; the message lists the names and the nearest one."""


@dataclass(frozen=True)
class Entry:
    """One line of a table.

    Attributes:
        path: where the class lives, ``"package.module:ClassName"``; imported on first use only, so that
            reading a table costs no import of torch.
        about: one line for ``--help`` and the README.
    """

    path: str
    about: str = ""

    def load(self) -> Any:
        """Import the module and return the class."""
        module, _, attribute = self.path.partition(":")
        return getattr(importlib.import_module(module), attribute)


E = TypeVar("E", bound=Entry)


def nearest(name: str, names: Iterator[str] | list[str]) -> str | None:
    """The most similar of ``names``, regardless of case, or None when nothing is close."""
    by_lower = {other.lower(): other for other in names}
    match = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.5)
    return by_lower[match[0]] if match else None


class Registry(Generic[E]):
    """An ordered table from names to entries.

    Args:
        kind: what the names are, as it stands in error messages (``"KD method"``).
        entries: name -> entry, in the order of the documentation.
    """

    def __init__(self, kind: str, entries: Mapping[str, E]) -> None:
        self.kind = kind
        self._entries = dict(entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __getitem__(self, name: str) -> E:
        """The entry called ``name``.

        Raises:
            UnknownNameError: there is none; the message names the nearest one and lists all.
        """
        if name in self._entries:
            return self._entries[name]
        guess = nearest(str(name), list(self._entries))
        hint = f" Did you mean {guess}?" if guess else ""
        raise UnknownNameError(f"unknown {self.kind} {name!r}.{hint} Known: {', '.join(self._entries)}.")

    def load(self, name: str) -> Any:
        """Import and return the class called ``name`` (raises :class:`UnknownNameError`)."""
        return self[name].load()
