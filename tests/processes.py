"""Groups of processes as torchrun starts them, without its cost.

One server imports torch and the project once, and every process of a group is a fork of it. A *job* is a function
at the top level of a test module; what it returns and what it prints come back.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["learners.train", "tests.learners.small"])


class Outcome(NamedTuple):
    """How a process of a group ended.

    Attributes:
        code: exit code; -9 for SIGKILL.
        result: what the job returned, None if it did not.
        output: standard output and error.
    """

    code: int
    result: Any
    output: str


class Group:
    """Processes that do one job together; leaving the block ends those that are left.

    Args:
        size: number of processes.
        job: called in each of them with ``arguments``.
    """

    def __init__(self, size: int, job: Callable[..., Any], *arguments: Any) -> None:
        self._folder = tempfile.TemporaryDirectory()
        files = [Path(self._folder.name, str(rank)) for rank in range(size)]
        self._outputs = [file.with_suffix(".output") for file in files]
        self._results = [file.with_suffix(".result") for file in files]
        group = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
        group |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        os.environ["PYTHONPATH"] = str(ROOT)  # for the server, whose path is not this process's
        self.processes = []
        for rank, files in enumerate(zip(self._outputs, self._results, strict=True)):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), **group}
            self.processes.append(FORKSERVER.Process(target=_member, args=(own, *files, job, arguments)))
            self.processes[-1].start()

    def __enter__(self) -> Group:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
            process.join()
        self._folder.cleanup()

    def send(self, signum: int, rank: int) -> None:
        os.kill(self.processes[rank].pid, signum)

    def output(self, rank: int = 0) -> str:
        """Everything that a process has printed so far."""
        path = self._outputs[rank]
        return path.read_text() if path.exists() else ""

    def wait_for(self, text: str, *, rank: int = 0, timeout: float = 120) -> None:
        """Wait until a process has printed ``text``."""
        self._wait(lambda: text in self.output(rank), timeout, f"{text!r}")

    def outcomes(self, ranks: Sequence[int] | None = None, *, timeout: float = 120) -> list[Outcome]:
        """Wait for the end of all processes, or of some; a test in which one takes longer fails."""
        ranks = range(len(self.processes)) if ranks is None else ranks
        self._wait(lambda: all(self.processes[rank].exitcode is not None for rank in ranks), timeout, "the end")
        results = [pickle.loads(path.read_bytes()) if path.exists() else None for path in self._results]
        return [Outcome(self.processes[rank].exitcode, results[rank], self.output(rank)) for rank in ranks]

    def _wait(self, reached: Callable[[], bool], timeout: float, what: str) -> None:
        limit = time.monotonic() + timeout
        while not reached():
            if time.monotonic() > limit:
                outputs = [self.output(rank) for rank in range(len(self.processes))]
                raise AssertionError(f"not reached within {timeout} s: {what}; printed so far: {outputs}")
            time.sleep(0.02)


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _member(environment: dict[str, str], output: Path, result: Path, job: Callable, arguments: tuple) -> None:
    import torch

    with open(output, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    torch.set_num_threads(1)
    result.write_bytes(pickle.dumps(job(*arguments)))
