"""CIFAR from a small archive of its layout: found, downloaded and checked."""

import hashlib
import io
import pickle
import tarfile

import numpy as np
import pytest
from torchvision import datasets

from dataloaders.base import DataError
from dataloaders.cifar import CIFAR100
from dataloaders.tasks import build_stream
from tests.dataloaders.conftest import config
from tests.dataloaders.server import serve

ARCHIVE = "cifar-100-python.tar.gz"


@pytest.fixture
def archive(monkeypatch):
    """4 training and 2 test images a class, which torchvision takes for CIFAR-100."""
    rng = np.random.default_rng(0)
    files = {"meta": {"fine_label_names": [f"name {label}" for label in range(100)]}}
    for name, images in (("train", 400), ("test", 200)):
        pixels = rng.integers(0, 256, (images, 3072), dtype=np.uint8)
        files[name] = {"data": pixels, "fine_labels": np.tile(np.arange(100), images // 100).tolist()}
    buffer, md5 = io.BytesIO(), {}
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, file in files.items():
            content = pickle.dumps(file, protocol=2)
            md5[name] = hashlib.md5(content).hexdigest()
            info = tarfile.TarInfo(f"cifar-100-python/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    monkeypatch.setattr(datasets.CIFAR100, "tgz_md5", hashlib.md5(buffer.getvalue()).hexdigest())
    monkeypatch.setattr(datasets.CIFAR100, "train_list", [["train", md5["train"]]])
    monkeypatch.setattr(datasets.CIFAR100, "test_list", [["test", md5["test"]]])
    monkeypatch.setattr(datasets.CIFAR100, "meta", datasets.CIFAR100.meta | {"md5": md5["meta"]})
    return buffer.getvalue()


def source(root, **settings) -> CIFAR100:
    return CIFAR100(config(dataroot=root, **settings), seed=0, progress=False)


def test_an_archive_in_dataroot_is_used_without_a_network(tmp_path, archive):
    (tmp_path / ARCHIVE).write_bytes(archive)
    stream = build_stream(config(dataset="CIFAR100", dataroot=tmp_path), seed=0, image_size=32)
    assert (stream.split, stream.class_names[3]) == ("official", "name 3")
    assert [(stream.train_size(task), stream.test_size(task)) for task in range(50)] == [(8, 4)] * 50
    raw = pickle.loads((tmp_path / "cifar-100-python" / "train").read_bytes())
    image = np.asarray(stream.train_images.store.open(217))
    assert np.array_equal(image.transpose(2, 0, 1).ravel(), raw["data"][217])
    assert stream.train_images.labels[217] == raw["fine_labels"][217] == 17


@pytest.mark.parametrize("name", ["train", "test", "meta"])
def test_complete_files_need_no_archive_and_damaged_ones_are_replaced(tmp_path, archive, name):
    with serve({ARCHIVE: archive}) as url:
        source(tmp_path, data_url=url)
        (tmp_path / ARCHIVE).write_bytes(archive[:5000])
        source(tmp_path, data_url="http://127.0.0.1:9")
        file = tmp_path / "cifar-100-python" / name
        file.write_bytes(file.read_bytes()[:100])
        with pytest.raises(DataError, match="cannot download .*refused"):
            source(tmp_path, data_url="http://127.0.0.1:9")
        assert len(source(tmp_path, data_url=url).load(train=True)[0]) == 400
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cifar-100-python", ARCHIVE]
