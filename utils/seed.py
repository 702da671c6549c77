"""Random numbers derived from their purpose, never from what was drawn before.

Every draw of a run comes from a stream that is derived from the run's seed and the names of its purpose, such as
``(seed, "augment", task, role, epoch, index)``. A run that is killed and resumed, or that uses another number of
workers or devices, therefore draws the same numbers.
"""

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
    """Seed torch's global CPU generator for one purpose within the block, and restore it afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(seed, *purpose))
        yield
