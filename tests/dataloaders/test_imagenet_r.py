"""ImageNet-R: the authors' split wherever it is, and the seeded one with its warning where it is not."""

import io
import logging
import time

import numpy as np
import pytest
import yaml

from dataloaders import imagenet_r
from dataloaders.base import DataError
from dataloaders.build import build_stream
from dataloaders.check import check_stream
from dataloaders.download import Checksum
from dataloaders.imagenet_r import TEST_FILE, TRAIN_FILE, ImageNetR
from dataloaders.loader import DataPipeline
from tests.dataloaders.conftest import picture
from tests.dataloaders.server import serve

WNIDS = [f"n{number:08d}" for number in range(1000, 1200)]
NAMES = ["art_0.jpg", "cartoon_1.jpg", "toy_2.jpg", "sketch_3.jpg", "tattoo_4.jpg"]


@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    """dataroot with 200 classes of 5 images."""
    root = tmp_path_factory.mktemp("dataroot")
    for label, wnid in enumerate(WNIDS):
        folder = root / "imagenet-r" / wnid
        folder.mkdir(parents=True)
        for number, name in enumerate(NAMES):
            picture(5 * label + number).save(folder / name)
    return root


def split_text(pairs) -> bytes:
    """A split file as the authors' are: one entry a line, not in the order of the classes."""
    data = "".join(f"- data/imagenet-r/{wnid}/{name}\n" for wnid, name, _ in pairs)
    targets = "".join(f"- {label}\n" for *_, label in pairs)
    return f"data:\n{data}targets:\n{targets}".encode()


@pytest.fixture(scope="session")
def authors():
    """The two files: the last image of each class is for testing, class numbers are a shuffle of the wnids."""
    rng = np.random.RandomState(0)
    numbers = rng.permutation(200)
    pairs = [(wnid, name, numbers[i]) for i, wnid in enumerate(WNIDS) for name in NAMES]
    order = rng.permutation(len(pairs))
    shuffled = [pairs[i] for i in order]
    return {
        TRAIN_FILE: split_text([pair for pair in shuffled if pair[1] != NAMES[4]]),
        TEST_FILE: split_text([pair for pair in shuffled if pair[1] == NAMES[4]]),
    }


@pytest.fixture(autouse=True)
def splits_dir(tmp_path, monkeypatch, authors):
    """An empty dataloaders/splits, no network, and the made files' checksums."""
    folder = tmp_path / "splits"
    folder.mkdir()
    monkeypatch.setattr(imagenet_r, "SPLITS_DIR", folder)
    monkeypatch.setattr(imagenet_r, "SPLITS_URL", "http://127.0.0.1:9/")
    sums = {name: Checksum("sha256", Checksum("sha256", "").of(io.BytesIO(text))) for name, text in authors.items()}
    monkeypatch.setattr(imagenet_r, "CHECKSUMS", sums)
    return folder


@pytest.fixture
def own_tree(tree, tmp_path):
    """A dataroot of the test's own, with the shared images behind a link."""
    root = tmp_path / "data root"
    root.mkdir()
    (root / "imagenet-r").symlink_to(tree / "imagenet-r")
    return root


def check_authors(source: ImageNetR, authors) -> None:
    assert source.split == "authors"
    for train, name in ((True, TRAIN_FILE), (False, TEST_FILE)):
        content = yaml.safe_load(authors[name])
        store, labels = source.load(train)
        assert labels.tolist() == content["targets"]
        assert [f"data/{store.name(i)}" for i in range(len(store))] == content["data"]
    for path, label in zip(content["data"], content["targets"], strict=True):
        assert source.class_names[label] == path.split("/")[2]


def test_local_files_are_used(tree, authors, splits_dir, caplog):
    for name, text in authors.items():
        (splits_dir / name).write_bytes(text)
    source = ImageNetR(tree)
    check_authors(source, authors)
    store, _ = source.load(train=True)
    assert store.open(0).mode == "RGB" and store.missing() == []
    assert not caplog.records
    assert not (tree / TRAIN_FILE).exists()


def test_local_files_that_are_not_the_authors_are_used_with_a_warning(tree, authors, splits_dir, caplog):
    (splits_dir / TRAIN_FILE).write_bytes(authors[TRAIN_FILE] + b"\n")
    (splits_dir / TEST_FILE).write_bytes(authors[TEST_FILE])
    check_authors(ImageNetR(tree), authors)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "not the authors' file" in caplog.text


def test_missing_files_are_fetched_into_dataroot_and_found_there(own_tree, authors, tmp_path):
    content = {f"/{name}": text for name, text in authors.items()}
    with serve(content, {f"/{TRAIN_FILE}": ["drop 300", "ok"], f"/{TEST_FILE}": ["ok"]}) as (url, requests):
        check_authors(ImageNetR(own_tree, data_url=url, log_dir=tmp_path / "log", progress=False), authors)
    assert len(requests) == 3
    check_authors(ImageNetR(own_tree), authors)
    assert sorted(path.name for path in own_tree.iterdir()) == sorted(["imagenet-r", TRAIN_FILE, TEST_FILE])
    assert not (tmp_path / "log").exists()


@pytest.mark.parametrize("behaviour", ["404", "page", "short 500"])
def test_the_fallback_is_drawn_once_and_warned_about(own_tree, authors, tmp_path, caplog, behaviour):
    content = {f"/{name}": text for name, text in authors.items()}
    log_dir = tmp_path / "log"
    with serve(content, {f"/{TRAIN_FILE}": [behaviour]}) as (url, _):
        source = ImageNetR(own_tree, data_url=url, seed=3, log_dir=log_dir, progress=False)
    assert source.split == "seeded"
    assert "not the paper's" in caplog.text and "WARNING" in caplog.text
    assert source.class_names == WNIDS
    (train, labels), (test, test_labels) = source.load(True), source.load(False)
    assert (len(train), len(test)) == (800, 200)
    assert np.bincount(test_labels).tolist() == [1] * 200
    names = [part.name(i) for part in (train, test) for i in range(len(part))]
    assert len(set(names)) == 1000
    assert all(WNIDS[label] in train.name(i) for i, label in enumerate(labels))
    assert [path.name for path in own_tree.iterdir()] == ["imagenet-r"]
    # A resumed run keeps it, whatever its seed and whatever can be fetched by now.
    resumed = ImageNetR(own_tree, seed=4, log_dir=log_dir)
    assert resumed.split == "seeded"
    assert [resumed.load(False)[0].name(i) for i in range(200)] == [test.name(i) for i in range(200)]
    other = ImageNetR(own_tree, seed=4)
    assert [other.load(False)[0].name(i) for i in range(200)] != [test.name(i) for i in range(200)]


def test_the_real_size_is_read_in_less_than_a_second(tmp_path):
    pairs = [(WNIDS[i % 200], f"sculpture_{i}.jpg", i % 200) for i in range(24_000)]
    (tmp_path / "big.yaml").write_bytes(split_text(pairs))
    start = time.process_time()
    files = imagenet_r._read_split(tmp_path / "big.yaml")
    assert time.process_time() - start < 1.0
    assert len(files.paths) == 24_000
    assert files.paths[1] == f"imagenet-r/{WNIDS[1]}/sculpture_1.jpg"


def test_missing_images_are_counted(tree, authors, splits_dir, tmp_path):
    for name, text in authors.items():
        (splits_dir / name).write_bytes(text.replace(b"art_0", b"art_9"))
    stream = build_stream(
        dataset="ImageNet_R", dataroot=tree, image_size=16, first_split_size=20, other_split_size=20
    )
    with pytest.raises(DataError, match="^200 of the images that the split lists are missing"):
        DataPipeline(stream, batch_size=4, eval_batch_size=4)
    bad = check_stream(stream, "ImageNet_R", progress=False)["bad"]
    assert len(bad) == 200 and all(name.endswith("art_9.jpg") for name in bad)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"<html>",
        b"data: [a",
        b"data: [data/imagenet-r/n1/a.jpg]\ntargets: [0, 1]",
        b"data: [data/imagenet-r/n1/a.jpg]\ntargets: [x]",
        b"data: [data/imagenet-r/n1/a.jpg]\ntargets: [200]",
        b"data: [data/../../etc/passwd]\ntargets: [0]",
        b"data: [/etc/passwd/x/y]\ntargets: [0]",
        b"data: [[1, 2]]\ntargets: [0]",
        b"- 1",
    ],
)
def test_a_damaged_split_file_is_named(tree, authors, splits_dir, text):
    (splits_dir / TRAIN_FILE).write_bytes(text)
    (splits_dir / TEST_FILE).write_bytes(authors[TEST_FILE])
    with pytest.raises(DataError, match="cannot use the split file .*imagenet-r_train.yaml") as caught:
        ImageNetR(tree)
    assert "\n" not in str(caught.value)


def test_what_is_missing_is_said_before_anything_else(tmp_path):
    (problem,) = ImageNetR.preflight(tmp_path)
    assert str(tmp_path / "imagenet-r") in problem
    assert "https://people.eecs.berkeley.edu/~hendrycks/imagenet-r.tar" in problem
    with pytest.raises(DataError, match="no folder"):
        ImageNetR(tmp_path)


def test_a_half_unpacked_folder_is_not_split(tmp_path, caplog):
    (tmp_path / "imagenet-r" / WNIDS[0]).mkdir(parents=True)
    logging.getLogger("dataloaders").setLevel(logging.INFO)
    with pytest.raises(DataError, match="has 1 class folders instead of 200"):
        ImageNetR(tmp_path)
