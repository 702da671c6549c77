"""A download counts when it is complete; archives write only where they should."""

import io
import multiprocessing
import os
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from dataloaders import download
from dataloaders.base import DataError
from dataloaders.download import Checksum, extract, fetch, mirrored, unwritable
from tests.dataloaders.conftest import md5, tar_of
from tests.dataloaders.server import serve

CONTENT = bytes(range(256)) * 1000
SUM = Checksum("md5", md5(CONTENT))


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(download, "time", SimpleNamespace(sleep=lambda seconds: None))


def get(folder: Path, behaviours: list[str], *, ranges: bool = True, **settings) -> list:
    """Fetch from a server that behaves so; the requests it got."""
    with serve({"/file": CONTENT}, {"/file": behaviours}, ranges=ranges) as (url, requests):
        fetch(f"{url}/file", folder / "file", SUM, **{"progress": False, "timeout": 5, **settings})
    return requests


@pytest.mark.parametrize(
    ("behaviours", "number"),
    [
        (["ok"], 1),
        (["slow"], 1),
        (["drop 1000", "ok"], 2),
        (["drop 0", "drop 0", "ok"], 3),
        (["corrupt", "ok"], 2),
        (["page", "ok"], 2),
        (["503", "429", "ok"], 3),
        (["short 1000", "ok"], 2),
    ],
)
@pytest.mark.parametrize("ranges", [True, False])
def test_trouble_that_passes(tmp_path, behaviours, number, ranges):
    assert len(get(tmp_path / "data", behaviours, ranges=ranges)) == number
    assert (tmp_path / "data" / "file").read_bytes() == CONTENT
    assert os.listdir(tmp_path / "data") == ["file"]


def test_a_broken_connection_is_resumed_where_it_broke(tmp_path):
    requests = get(tmp_path, ["drop 1000", "drop 500", "ok"])
    assert [wanted for _, wanted in requests] == [None, "bytes=1000-", "bytes=1500-"]


def test_a_killed_download_is_resumed_and_a_wrong_start_is_thrown_away(tmp_path):
    (tmp_path / ".file.part").write_bytes(CONTENT[:700])
    assert get(tmp_path, ["ok"])[0][1] == "bytes=700-"
    (tmp_path / "file").unlink()
    (tmp_path / ".file.part").write_bytes(b"x" * 700)
    assert [wanted for _, wanted in get(tmp_path, ["ok"])] == ["bytes=700-", None]
    (tmp_path / "file").unlink()
    (tmp_path / ".file.part").write_bytes(CONTENT + b"more")
    assert len(get(tmp_path, ["ok"])) == 2
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize(
    ("behaviours", "message", "number"),
    [
        (["404"], "the server answers 404", 1),
        (["403"], "the server answers 403", 1),
        (["500"], "the server answers 500", 3),
        (["drop 100"], "the connection ended after", 3),
        (["corrupt"], "its MD5 is .* instead of", 3),
        (["page"], "its MD5 is .* instead of", 3),
        (["stall"], "timed out", 3),
    ],
)
def test_trouble_that_stays(tmp_path, behaviours, message, number):
    with serve({"/file": CONTENT}, {"/file": behaviours}, ranges=False) as (url, requests):
        with pytest.raises(DataError, match=message) as caught:
            fetch(f"{url}/file", tmp_path / "file", SUM, progress=False, tries=3, timeout=0.1)
    assert len(requests) == number
    assert f"{url}/file" in str(caught.value) and "--data_url" in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_nobody_there(tmp_path):
    with pytest.raises(DataError, match="Connection refused"):
        fetch("http://127.0.0.1:9/file", tmp_path / "file", SUM, progress=False, tries=2)
    with pytest.raises(DataError, match="unknown url type"):
        fetch("nonsense", tmp_path / "file", SUM, progress=False, tries=2)
    assert os.listdir(tmp_path) == []


def test_an_interrupted_download_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(download, "_receive", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch("http://127.0.0.1:9/file", tmp_path / "file", SUM)
    assert os.listdir(tmp_path) == []


def test_a_failed_download_leaves_what_was_there(tmp_path):
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(DataError):
        get(tmp_path, ["404"])
    assert (tmp_path / "file").read_bytes() == b"old"


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "data").write_text("a file, no folder")
    with pytest.raises(DataError, match="cannot write .*data/file"):
        get(tmp_path / "data", ["ok"])
    assert "is not a folder" in unwritable(tmp_path / "data" / "below")
    assert unwritable(tmp_path / "new" / "folder") is None


def test_of_two_processes_one_downloads(tmp_path):
    with serve({"/file": CONTENT}, {"/file": ["slow"]}) as (url, requests):
        arguments = (f"{url}/file", tmp_path / "file", SUM)
        context = multiprocessing.get_context("fork")
        others = [context.Process(target=fetch, args=arguments, kwargs={"progress": False}) for _ in range(3)]
        for other in others:
            other.start()
        for other in others:
            other.join(timeout=20)
        assert [other.exitcode for other in others] == [0, 0, 0]
    assert len(requests) == 1
    assert os.listdir(tmp_path) == ["file"]


def test_a_mirror_is_a_folder_or_the_file_itself():
    official = "https://host/path/cifar.tar.gz"
    assert mirrored(official, None) == official
    assert mirrored(official, "http://mirror/x") == "http://mirror/x/cifar.tar.gz"
    assert mirrored(official, "http://mirror/x/") == "http://mirror/x/cifar.tar.gz"
    assert mirrored(official, "file:///d/cifar.tar.gz") == "file:///d/cifar.tar.gz"


def test_a_file_address_works(tmp_path):
    (tmp_path / "there").write_bytes(CONTENT)
    fetch((tmp_path / "there").as_uri(), tmp_path / "here" / "file", SUM, progress=False)
    assert (tmp_path / "here" / "file").read_bytes() == CONTENT


EVIL_TYPES = {
    "link": tarfile.LNKTYPE,
    "symlink": tarfile.SYMTYPE,
    "device": tarfile.CHRTYPE,
    "folder": tarfile.DIRTYPE,
}


def evil_member(kind: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo("set/wanted" if kind in EVIL_TYPES else kind)
    info.type = EVIL_TYPES.get(kind, tarfile.REGTYPE)
    info.linkname = "/etc/passwd"
    return info


@pytest.mark.parametrize("kind", ["../evil", "/tmp/evil-cdl", "set/../../evil", *EVIL_TYPES])
def test_an_archive_writes_nothing_but_the_plain_files_asked_for(tmp_path, kind):
    root = tmp_path / "root"
    root.mkdir()
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.addfile(evil_member(kind), io.BytesIO(b""))
        info = tarfile.TarInfo("set/good")
        info.size = 4
        tar.addfile(info, io.BytesIO(b"good"))
    extract(tmp_path / "a.tar", root, ["set/good"])
    with pytest.raises(DataError, match="set/wanted"):
        extract(tmp_path / "a.tar", root, ["set/wanted"])
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")) == [
        "a.tar",
        "root",
        "root/set",
        "root/set/good",
    ]
    assert not Path("/tmp/evil-cdl").exists()


def test_a_damaged_archive_is_named(tmp_path):
    whole = tar_of({"set/a": os.urandom(5000), "set/b": b"b"})
    for content in (whole[:2000], b"", b"no archive", whole[:-3000]):
        (tmp_path / "a.tar.gz").write_bytes(content)
        with pytest.raises(DataError, match="a.tar.gz"):
            extract(tmp_path / "a.tar.gz", tmp_path, ["set/a", "set/b"])
        assert not (tmp_path / "set" / "b").exists()
    assert not list(tmp_path.rglob("*.part"))
