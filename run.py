"""Continual distillation learning from the command line: ``python run.py --help``."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from learners.check import help_page, load_checked_config
from utils.config import ConfigError, wants_help


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line.

    Returns:
        Exit code: 0; 1 for a run that could not go on; 2 for one that cannot start; 128 + n after signal n.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if wants_help(argv):
        print(help_page(), end="")
        return 0
    config = None
    try:
        config = load_checked_config(argv)
        from learners.experiment import run

        return run(config)  # loads torch, after all that can be refused without it
    except ConfigError as error:
        # All of torchrun's processes on a machine find the same mistakes in the flags: one names them.
        if config is not None or os.environ.get("LOCAL_RANK", "0") == "0":
            for problem in error.problems:
                print(f"run.py: error: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def end(code: int) -> NoReturn:
    """End this process with an exit code.

    A process of a group does so without taking the interpreter apart: DistributedDataParallel leaves gloo's threads
    behind, and one that lets go of a tensor meanwhile ends the process with SIGABRT, after all its work is done.
    """
    if "RANK" not in os.environ:
        sys.exit(code)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    try:
        exit_code = main()
    except Exception:  # a mistake of the program's own: into the log, too
        logging.getLogger(__name__).exception("run.py has met an error that it does not know")
        exit_code = 1
    end(exit_code)
