"""ImageNet-R, here with 4 classes: the authors' split wherever it is, and a drawn one with its warning elsewhere."""

import hashlib

import pytest
import yaml
from PIL import Image

from dataloaders import imagenet_r
from dataloaders.base import DataError
from dataloaders.download import Checksum
from dataloaders.imagenet_r import TEST_FILE, TRAIN_FILE, ImageNetR
from tests.dataloaders.conftest import class_folders, config, names
from tests.dataloaders.server import serve

WNIDS = ["n1", "n2", "n3", "n4"]
NUMBERS = [2, 0, 3, 1]  # the authors' class numbers are a shuffle of the wnids


def split_file(images: range) -> bytes:
    paths = [f"data/imagenet-r/{wnid}/{number}.jpg" for number in images for wnid in WNIDS]
    return yaml.safe_dump({"data": paths, "targets": NUMBERS * len(images)}).encode()


AUTHORS = {TRAIN_FILE: split_file(range(1, 5)), TEST_FILE: split_file(range(1))}


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A dataroot with 4 classes of 5 images; no split file is installed or can be downloaded."""
    monkeypatch.setattr(ImageNetR, "num_classes", 4)
    monkeypatch.setattr(imagenet_r, "SPLITS_DIR", tmp_path)
    monkeypatch.setattr(imagenet_r, "SPLITS_URL", "http://127.0.0.1:9/")
    sums = {name: Checksum("sha256", hashlib.sha256(text).hexdigest()) for name, text in AUTHORS.items()}
    monkeypatch.setattr(imagenet_r, "CHECKSUMS", sums)
    class_folders(tmp_path / "data root" / "imagenet-r", WNIDS, 5)
    return tmp_path / "data root"


def write(folder, files) -> None:
    for name, text in files.items():
        (folder / name).write_bytes(text)


def source(root, seed=0, resumed_dir=None, **settings) -> ImageNetR:
    return ImageNetR(config(dataroot=root, **settings), seed=seed, resumed_dir=resumed_dir, progress=False)


def check_authors(found: ImageNetR) -> None:
    assert (found.split, found.drawn_split, found.class_names) == ("authors", {}, ["n2", "n4", "n1", "n3"])
    assert names(found.load(False)) == [f"imagenet-r/{wnid}/0.jpg" for wnid in WNIDS]
    assert found.load(False)[1].tolist() == NUMBERS and found.load(True)[1].tolist() == NUMBERS * 4


def test_exif_orientation_is_not_undone(root, tmp_path):
    write(tmp_path, AUTHORS)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (16, 8)).save(root / "imagenet-r/n1/0.jpg", exif=exif)
    store, _ = source(root).load(False)
    assert store.open(0).size == (16, 8)  # as the original reads it


def test_the_authors_files_are_installed_or_downloaded_into_dataroot(root, tmp_path, caplog):
    with serve(AUTHORS) as url:
        check_authors(source(root, data_url=url))
    check_authors(source(root))
    write(tmp_path, AUTHORS)
    (root / TRAIN_FILE).unlink()
    check_authors(source(root, resumed_dir=root / "imagenet-r"))
    assert "WARNING" not in caplog.text and not (root / TRAIN_FILE).exists()
    write(tmp_path, {TRAIN_FILE: AUTHORS[TRAIN_FILE] + b"\n"})
    check_authors(source(root))
    assert "not the authors' file" in caplog.text


def test_without_the_files_a_split_is_drawn_which_a_resume_keeps(root, tmp_path, caplog):
    with serve(AUTHORS, "page") as url:
        drawn = source(root, seed=3, data_url=url)
    assert (drawn.split, drawn.class_names) == ("seeded", WNIDS)
    assert "not the paper's" in caplog.text and caplog.records[-1].levelname == "WARNING"
    train, test = names(drawn.load(True)), names(drawn.load(False))
    assert len({*train, *test}) == 20 and drawn.load(False)[1].tolist() == [0, 1, 2, 3]
    assert names(source(root, seed=4).load(False)) != test
    log_dir = root  # any folder
    write(log_dir, drawn.drawn_split)
    write(tmp_path, AUTHORS)  # a resumed run keeps its split, even if the authors' is available by now
    resumed = source(root, seed=3, resumed_dir=log_dir)
    assert resumed.split == "seeded" and "that drawn before, in" in caplog.text
    assert (names(resumed.load(True)), names(resumed.load(False))) == (train, test)


DAMAGED = ["", "- 1", "data: [a", "data: [[1, 2]]\ntargets: [0]", "data: [data/../../etc/passwd]\ntargets: [0]"]
DAMAGED += [f"data: [data/imagenet-r/n1/1.jpg]\ntargets: [{targets}]" for targets in ("0, 1", "x", "4", ".inf", "yes")]


@pytest.mark.parametrize("text", DAMAGED)
def test_a_damaged_split_file_is_named(root, tmp_path, text):
    write(tmp_path, AUTHORS | {TRAIN_FILE: text.encode()})
    with pytest.raises(DataError, match=f"cannot use .*{TRAIN_FILE}|5 classes instead of 4 in {TRAIN_FILE}") as caught:
        source(root)
    assert "\n" not in str(caught.value)
