"""Continual distillation learning from the command line: ``python run.py --help``."""

import logging
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from learners.check import load_checked_config, print_help
from utils.config import ConfigError

__version__ = "1.0.0"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; exit code 0, 1 for a run that ended early, 2 if it cannot start, 128 + n after signal n."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if {"-h", "--help"} & set(argv):
        print_help()
        return 0
    if "--version" in argv:
        print(f"Continual Distillation Learning {__version__}")
        return 0
    config = None
    try:
        config = load_checked_config(argv)
        # These load torch, after everything that can be refused without it.
        if config.action == "train":
            from learners.train import run
        else:
            from learners.evaluate import run
        return run(config)
    except ConfigError as error:
        # All of torchrun's processes on a machine find the same mistakes in the flags: one names them.
        if config is not None or os.environ.get("LOCAL_RANK", "0") == "0":
            for problem in error.problems:
                print(f"run.py: error: {problem}", file=sys.stderr)
        return 2
    except PermissionError as error:  # folders of other people
        print(f"run.py: error: {error.filename}: {error.strerror}; check the path, or ask its owner", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def cli() -> NoReturn:
    """Run the command line of this process and end it.

    A process of a group ends without cleaning up the interpreter: DistributedDataParallel leaves gloo's threads
    behind, and one that releases a tensor meanwhile ends the process with SIGABRT, after all its work is done.
    """
    try:
        code = main()
    except Exception:  # a bug: into the log, too
        logging.getLogger(__name__).exception("run.py stopped on an unexpected error")
        code = 1
    if "RANK" not in os.environ:
        sys.exit(code)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    cli()
