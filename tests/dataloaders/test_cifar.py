"""CIFAR from a small archive of its layout: found, downloaded, checked, and never run."""

import pickle

import numpy as np
import pytest
from torchvision import datasets

from dataloaders.base import DataError
from dataloaders.build import build_stream
from dataloaders.cifar import CIFAR10, CIFAR100
from tests.dataloaders.conftest import md5, tar_of
from tests.dataloaders.server import serve

NAME = "cifar-100-python.tar.gz"


@pytest.mark.parametrize(("ours", "theirs"), [(CIFAR100, datasets.CIFAR100), (CIFAR10, datasets.CIFAR10)])
def test_addresses_and_checksums_are_torchvisions(ours, theirs):
    assert (ours.url, ours.archive_md5, ours.folder) == (theirs.url, theirs.tgz_md5, theirs.base_folder)
    assert list(ours.train_files.items()) == [tuple(entry) for entry in theirs.train_list]
    assert list(ours.test_files.items()) == [tuple(entry) for entry in theirs.test_list]
    assert ours.meta_files == {theirs.meta["filename"]: theirs.meta["md5"]}
    assert ours.names_key == theirs.meta["key"]


def test_an_archive_in_dataroot_is_used_without_a_network(tmp_path, cifar_archive):
    (tmp_path / NAME).write_bytes(cifar_archive)
    stream = build_stream(
        dataset="CIFAR100", dataroot=tmp_path, image_size=32, first_split_size=10, other_split_size=10
    )
    assert (len(stream), stream.split, stream.class_names[3]) == (10, "official", "name 3")
    assert [stream.train_size(t) for t in range(10)] == [40] * 10
    assert [stream.test_size(t) for t in range(10)] == [20] * 10
    raw = pickle.loads((tmp_path / "cifar-100-python" / "train").read_bytes())["data"]
    image = np.asarray(stream.train_images.store.open(17))
    assert np.array_equal(image.transpose(2, 0, 1).ravel(), raw[17])


def test_unpacked_files_are_used_without_the_archive_and_mended_from_it(tmp_path, cifar_archive):
    (tmp_path / NAME).write_bytes(cifar_archive)
    CIFAR100(tmp_path)
    (tmp_path / NAME).unlink()
    CIFAR100(tmp_path)
    (tmp_path / NAME).write_bytes(cifar_archive)
    train = tmp_path / "cifar-100-python" / "train"
    content = train.read_bytes()
    train.write_bytes(content[:1000])
    CIFAR100(tmp_path)
    assert train.read_bytes() == content


def test_a_mirror_and_a_truncated_archive_from_before(tmp_path, cifar_archive):
    (tmp_path / NAME).write_bytes(cifar_archive[:5000])
    with serve({f"/m/{NAME}": cifar_archive}, {f"/m/{NAME}": ["drop 3000", "ok"]}) as (url, requests):
        source = CIFAR100(tmp_path, data_url=f"{url}/m", progress=False)
    assert len(requests) == 2
    assert len(source.load(train=True)[0]) == 400


def test_a_mirror_that_fails_leaves_nothing(tmp_path, cifar_archive):
    with serve({}, {}) as (url, _):
        with pytest.raises(DataError, match=f"cannot download {url}/{NAME}: the server answers 404"):
            CIFAR100(tmp_path / "data", data_url=url, progress=False)
    assert list((tmp_path / "data").iterdir()) == []


class Evil:
    def __reduce__(self):
        return (open, ("evil", "w"))


def test_a_pickle_with_code_in_it_is_refused(tmp_path, cifar_archive, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = {name: pickle.dumps({"data": Evil()}) for name in ("train", "test", "meta")}
    archive = tar_of({f"cifar-100-python/{name}": content for name, content in files.items()})
    monkeypatch.setattr(CIFAR100, "archive_md5", md5(archive))
    for name, content in files.items():
        monkeypatch.setattr(CIFAR100, f"{name}_files", {name: md5(content)})
    (tmp_path / NAME).write_bytes(archive)
    with pytest.raises(DataError, match=r"cannot read .*meta: it refers to (io|_io|builtins)\.open"):
        CIFAR100(tmp_path)
    assert not (tmp_path / "evil").exists()


def test_an_archive_with_other_files_under_the_names_is_refused(tmp_path, cifar_archive, monkeypatch):
    archive = tar_of({f"cifar-100-python/{name}": b"other" for name in ("train", "test", "meta")})
    monkeypatch.setattr(CIFAR100, "archive_md5", md5(archive))
    (tmp_path / NAME).write_bytes(archive)
    with pytest.raises(DataError, match="its files are not those of CIFAR100"):
        CIFAR100(tmp_path)


def test_preflight_says_that_nothing_can_be_downloaded_into_a_file(tmp_path):
    (tmp_path / "data").touch()
    assert CIFAR100.preflight(tmp_path) == []
    (problem,) = CIFAR100.preflight(tmp_path / "data")
    assert problem.startswith("dataset CIFAR100 cannot be downloaded to dataroot")
