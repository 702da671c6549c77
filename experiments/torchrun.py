"""torchrun, which ends with the exit code of the process that failed, and without a traceback of its own."""

import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

try:
    main()
except ChildFailedError as error:  # the process has said why
    _, failure = error.get_first_failure()
    sys.exit(failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode)
except SignalException as stopped:
    sys.exit(128 + stopped.sigval)
