"""Settings for all tests: the same numbers on every CPU, and no network."""

import os
import socket

import pytest

# All of this is read when torch and the hub's client are loaded, and inherited by the processes of tests.
os.environ.setdefault("MKL_CBWR", "COMPATIBLE")  # one order of sums on all CPUs, see tests/golden.py
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TORCH_DISABLE_NATIVE_JIT"] = "1"  # on GPUs, products in float64 would need a C compiler


def is_local(address: object) -> bool:
    """Whether a socket's address is on this machine (paths of Unix sockets are)."""
    return not isinstance(address, tuple) or address[0] in ("127.0.0.1", "::1", "localhost")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    """What a test printed reaches pytest-xdist as UTF-8, names of files that are not UTF-8 with question marks."""
    report = yield
    report.sections = [(title, text.encode(errors="replace").decode()) for title, text in report.sections]
    return report


@pytest.fixture(autouse=True, scope="session")
def no_network():
    """Connecting to another machine fails at once, as on a machine without network."""
    connect = socket.socket.connect

    def refuse(self, address):
        if not is_local(address):
            raise OSError(f"a test tried to reach {address}")
        return connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        yield


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Configuration of runs that take a second, see tests/runs.py."""
    from tests import runs  # not before the settings above, as it loads numpy

    return runs.make(tmp_path_factory.mktemp("small"))
