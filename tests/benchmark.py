"""Benchmarks with random weights: ``python -m tests.benchmark step|savings|growth|data [options]``."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from utils.config import ConfigError

BENCHMARKS = ("step", "savings", "growth", "data")


def main(argv: Sequence[str]) -> int:
    if not argv or argv[0] not in BENCHMARKS:
        sys.stderr.write(f"usage: python -m tests.benchmark {{{','.join(BENCHMARKS)}}} [--help | options]\n")
        return 2
    try:
        importlib.import_module(f"tests.benchmark_{argv[0]}").main(argv[1:])
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
