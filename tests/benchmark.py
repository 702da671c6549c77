"""Benchmarks of the step: ``python -m tests.benchmark step ...``, ``savings``, ``growth``; of loading: ``data``."""

from __future__ import annotations

import importlib
import sys

BENCHMARKS = {name: f"tests.benchmark_{name}" for name in ("step", "savings", "growth", "data")}


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] not in BENCHMARKS:
        sys.stderr.write(f"usage: python -m tests.benchmark {{{','.join(BENCHMARKS)}}} [--help | options]\n")
        return 2
    return importlib.import_module(BENCHMARKS[argv[0]]).main(argv[1:])


if __name__ == "__main__":
    sys.exit(main())
