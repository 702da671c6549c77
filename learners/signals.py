"""Signals that stop a run or make it save."""

import os
import signal


class StoppedError(BaseException):
    """The run was asked to stop; like KeyboardInterrupt not an Exception, so handlers of errors let it pass."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}; the same command resumes from here")
        self.exit_code = 128 + signum


class Signals:
    """Remember the requests that come while the block runs.

    SIGINT or SIGTERM once asks to stop after the current step, twice ends the process at once (every file is
    consistent at any moment); SIGUSR1 asks to save and continue. Before :meth:`finish_steps` there is nothing to
    finish: :class:`StoppedError` is raised at once, wherever the process is.

    ``stop`` is the number of the signal that asked to stop, or 0; ``save`` asks to save at the next opportunity.
    """

    def __init__(self) -> None:
        self.stop = 0
        self.save = False
        self._at_once = True

    def __enter__(self) -> "Signals":
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        self._previous = {signum: signal.signal(signum, self._handle) for signum in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def finish_steps(self) -> None:
        """From now on a signal only leaves its number in ``stop``."""
        self._at_once = False

    def _handle(self, signum: int, _: object) -> None:
        if signum == signal.SIGUSR1:
            self.save = True
            return
        if self.stop:
            os._exit(128 + signum)
        self.stop = signum
        if self._at_once:
            raise StoppedError(signum)
        # Through the file descriptor: a handler must not wait for a lock that the interrupted code holds.
        name = signal.Signals(signum).name
        os.write(2, f"\n{name}: finishing this step and saving; once more ends at once\n".encode())
