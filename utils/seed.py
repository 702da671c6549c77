"""Random numbers that depend on what they are for, never on what happened before.

Every draw of a run comes from a stream derived from the run's seed and the names of its purpose, such as
``(seed, "augment", task, phase, epoch, index)``. A run that was killed and resumed, or that runs on another
number of workers or devices, therefore draws the same numbers.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator

import torch


def derive_seed(seed: int, *purpose: int | str) -> int:
    """A seed in [0, 2**63) for one purpose of a run; equal arguments give equal seeds on every machine."""
    text = "/".join([str(int(seed)), *(str(part) for part in purpose)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def generator(seed: int, *purpose: int | str) -> torch.Generator:
    """A CPU generator for one purpose of a run."""
    return torch.Generator().manual_seed(derive_seed(seed, *purpose))


@contextlib.contextmanager
def seeded(seed: int, *purpose: int | str) -> Iterator[None]:
    """Within the block torch's global CPU generator is seeded for one purpose; afterwards it is as before."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(seed, *purpose))
        yield
