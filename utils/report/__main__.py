"""The command ``python -m utils.report``."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from utils.checkpoint import RunFolderError, write_atomic
from utils.logging import setup_logging
from utils.report.formats import csv_text, latex, markdown
from utils.report.page import html_page
from utils.report.runs import NO_RUN, find_runs
from utils.report.table import Report, build_report, clean

_log = logging.getLogger(__name__)
_ADVICE = "give the log_dir of a run or a folder that holds some"


def write_report(folders: Sequence[Path], out: Path) -> Report:
    """Write the four files of a report on the runs below ``folders`` into ``out``.

    Raises:
        ValueError: a folder does not exist, nothing in them is a run, or ``out`` cannot be written.
    """
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"{folder} is not a folder: {_ADVICE}")
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file: give a folder")
    runs, unused = find_runs(folders, leave_out=out)
    if not runs and all(reason.startswith(NO_RUN) for _, reason in unused):
        raise ValueError(f"there is no run in {', '.join(map(str, folders))}: {_ADVICE}")
    report = build_report(runs, unused)
    texts = {"report.md": markdown(report), "report.csv": csv_text(report), "report.tex": latex(report),
             "report.html": html_page(report)}  # fmt: skip
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            write_atomic(out / name, text.encode())
    except (OSError, RunFolderError) as error:
        raise ValueError(f"--out {out} cannot be written: {error}") from error
    return report


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, without the usage in front."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = _Parser(prog="python -m utils.report", allow_abbrev=False,
                     description="Write one report over many runs: report.md, .csv, .tex and .html.")
    parser.add_argument("folders", metavar="DIR", nargs="+", type=Path,
                        help="log_dir of a run, or a folder with any number of them")
    parser.add_argument("--out", metavar="DIR", type=Path, default=Path("report"),
                        help="folder for the report (default: report)")
    arguments = parser.parse_args(argv)
    setup_logging(None)
    try:
        report = write_report(arguments.folders, arguments.out)
    except ValueError as error:
        sys.stderr.write(f"{parser.prog}: {clean(str(error))}\n")
        return 2
    complete = sum(run.complete for run in report.runs)
    _log.info("%d complete and %d unfinished runs, %d folders not used; see %s", complete,
              len(report.runs) - complete, len(report.unused), arguments.out / "report.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())
