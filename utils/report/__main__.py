"""One report over many runs: ``python -m utils.report DIR… --out report/``.

Finds the runs below the folders, joins those that differ only in the seed, and writes ``report.md`` with its
pictures, ``report.csv``, ``report.tex`` and ``report.html`` in the layout of the paper's table, with the paper's
numbers beside ours. Measures are computed again from the accuracies, and all text is escaped.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from utils.packages import missing_packages

_log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m utils.report", description="Write one report over many runs.")
    parser.add_argument("folders", metavar="DIR", nargs="+", type=Path, help="log_dir of a run, or a folder of runs")
    parser.add_argument("--out", metavar="DIR", default="report", type=Path, help="for report.md, .csv, .tex and .html")
    arguments = parser.parse_args(argv)
    if problem := missing_packages():
        parser.error(problem)
    # These load packages.
    from utils.logging import setup_logging
    from utils.report.formats import compose, csv_text, latex, markdown, picture_files
    from utils.report.page import html_page
    from utils.report.runs import find_runs
    from utils.report.table import build_tables

    setup_logging(None)
    try:
        runs, unused = find_runs(arguments.folders)
    except ValueError as error:
        parser.error(str(error))
    tables = build_tables(runs)
    sections = compose(tables, runs, unused)
    texts = {"md": markdown(sections), "csv": csv_text(tables), "tex": latex(sections), "html": html_page(sections)}
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
        for ending, text in texts.items():  # names of folders may hold bytes that are not UTF-8
            (arguments.out / f"report.{ending}").write_text(text, encoding="utf-8", errors="replace")
        for name, png in picture_files(sections).items():
            (arguments.out / name).write_bytes(png)
    except OSError as error:
        parser.error(f"--out {arguments.out} cannot be written: {error}")
    complete = sum(run.complete for run in runs)
    counts = (complete, len(runs) - complete, len(unused))
    _log.info("%d complete and %d unfinished runs, %d folders not used; see %s/report.html", *counts, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
