"""Benchmarks: ``python -m tests.benchmark step ...`` (training and evaluation) or ``data ...`` (loading)."""

from __future__ import annotations

import importlib
import sys

BENCHMARKS = {"step": "tests.benchmark_step", "data": "tests.benchmark_data"}


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] not in BENCHMARKS:
        sys.stderr.write(f"usage: python -m tests.benchmark {{{','.join(BENCHMARKS)}}} [--help | options]\n")
        return 2
    return importlib.import_module(BENCHMARKS[argv[0]]).main(argv[1:])


if __name__ == "__main__":
    sys.exit(main())
