"""Lazy tables of what can be chosen by name: learners, KD methods, data sets."""

import difflib
import importlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, NoReturn, TypeVar


@dataclass(frozen=True)
class Entry:
    """One line of a table: the class as ``"package.module:ClassName"``, and one line about it for ``--help``."""

    path: str
    about: str = ""

    def load(self) -> Any:
        """Import the module and return the class; until then a table costs no import of torch."""
        module, _, attribute = self.path.partition(":")
        return getattr(importlib.import_module(module), attribute)


E = TypeVar("E", bound=Entry)


class Registry(dict[str, E], Generic[E]):
    """A table from names to entries, in the order of the documentation.

    ``kind`` is what messages call a name (``"KD method"``). An unknown one raises ValueError, which lists the others.
    """

    def __init__(self, kind: str, entries: Mapping[str, E]) -> None:
        super().__init__(entries)
        self.kind = kind

    def __missing__(self, name: str) -> NoReturn:
        guess = nearest(name, self)
        hint = f" Did you mean {guess}?" if guess else ""
        raise ValueError(f"unknown {self.kind} {name!r}.{hint} Known: {', '.join(self)}.")


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The most similar of ``names``, ignoring case, or None when nothing is close."""
    by_lower = {other.lower(): other for other in names}
    match = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.5)
    return by_lower[match[0]] if match else None
