"""A download counts only when it is complete."""

import hashlib
import multiprocessing
import os

import pytest

from dataloaders.base import DataError
from dataloaders.download import Checksum, fetch, mirrored
from tests.dataloaders.server import serve

CONTENT = bytes(range(256)) * 1000
SUM = Checksum("md5", hashlib.md5(CONTENT).hexdigest())


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [("cut", "MD5"), ("corrupt", "MD5"), ("page", "MD5"), ("404", "Not Found"), ("down", "Connection refused")],
)
def test_a_download_that_fails_is_explained_and_changes_nothing(tmp_path, behaviour, reason):
    target = tmp_path / "file"
    target.write_bytes(b"old")
    with serve({} if behaviour == "404" else {"file": CONTENT}, behaviour) as url:
        address = "http://127.0.0.1:9/file" if behaviour == "down" else f"{url}/file"
        with pytest.raises(DataError, match=reason) as caught:
            fetch(address, target, SUM, progress=False)
    message = str(caught.value)
    assert address in message and str(target) in message and "--data_url" in message and "\n" not in message
    assert target.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


def test_several_processes_that_want_the_same_file_all_get_it(tmp_path):
    with serve({"file": CONTENT}) as url:
        arguments = (f"{url}/file", tmp_path / "new" / "file", SUM)
        others = [multiprocessing.Process(target=fetch, args=arguments, kwargs={"progress": False}) for _ in range(3)]
        for other in others:
            other.start()
        for other in others:
            other.join(timeout=20)
    assert [other.exitcode for other in others] == [0, 0, 0]
    assert (tmp_path / "new" / "file").read_bytes() == CONTENT and os.listdir(tmp_path / "new") == ["file"]
    fetch(*arguments)  # the server is gone, but the file is complete


def test_a_mirror_is_a_folder_or_the_file_itself(tmp_path):
    official, mirror = "https://host/path/cifar.tar.gz", tmp_path.as_uri()
    assert mirrored(official, None) == official
    for given in (mirror, f"{mirror}/", f"{mirror}/cifar.tar.gz"):
        assert mirrored(official, given) == f"{mirror}/cifar.tar.gz"
    (tmp_path / "cifar.tar.gz").write_bytes(CONTENT)
    fetch(mirrored(official, mirror), tmp_path / "file", SUM, progress=False)
    assert (tmp_path / "file").read_bytes() == CONTENT
