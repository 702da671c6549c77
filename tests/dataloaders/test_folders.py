"""Data sets of class folders: ImageNet-A, DomainNet, and any folder."""

import numpy as np
import pytest

from dataloaders import domainnet, imagenet_a
from dataloaders.base import DataError
from dataloaders.build import build_stream
from dataloaders.domainnet import DomainNet
from dataloaders.folders import find_images, subfolders
from dataloaders.image_folder import ImageFolder
from dataloaders.imagenet_a import ImageNetA
from dataloaders.preflight import count_classes
from tests.dataloaders.conftest import class_folders, picture


def names(part) -> list[str]:
    store, labels = part
    assert len(store) == len(labels) and labels.dtype == np.int64
    return [store.name(i) for i in range(len(store))]


def test_what_counts_as_an_image(tmp_path):
    folder = tmp_path / "c"
    (folder / "deep" / "er").mkdir(parents=True)
    kept = ["a b.JPEG", "b.png", "c.WebP", "deep/d.jpg", "deep/er/é.jpg", "ünï日本.png"]
    for name in kept:
        (folder / name).touch()
    for name in (".hidden.jpg", "notes.txt", "README.md", "Thumbs.db", "jpg"):
        (folder / name).touch()
    (folder / "link.jpg").symlink_to("b.png")
    (folder / "gone.jpg").symlink_to("nowhere")
    (folder / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x.jpg").touch()
    (folder / "deep" / "loop").symlink_to(folder)
    found = list(find_images(tmp_path, "c"))
    assert found == sorted(found)
    assert set(found) == {f"c/{name}" for name in [*kept, "link.jpg", "gone.jpg", "more/x.jpg"]}


def test_subfolders(tmp_path):
    for name in ("b", "a", ".git"):
        (tmp_path / name).mkdir()
    (tmp_path / "README.txt").touch()
    assert subfolders(tmp_path) == ["a", "b"]
    with pytest.raises(DataError, match="cannot read the folder"):
        subfolders(tmp_path / "gone")


@pytest.mark.parametrize("prefix", ["", "train"])
def test_image_folder(tmp_path, prefix):
    root = tmp_path / "my data"
    class_folders(root / prefix, ["dog", "cat", "élan"], 5, ".JPEG")
    if prefix:
        class_folders(root / "val", ["cat", "dog", "élan", "unknown"], 2, ".png")
    (root / "README.txt").touch()
    source = ImageFolder(root)
    assert source.class_names == ["cat", "dog", "élan"]
    assert count_classes("ImageFolder", root) == 3
    train, test = source.load(True), source.load(False)
    assert source.split == ("folder" if prefix else "seeded")
    assert (len(names(train)), len(names(test))) == ((15, 6) if prefix else (12, 3))
    assert not set(names(train)) & set(names(test))
    for part in (train, test):
        for name, label in zip(names(part), part[1], strict=True):
            assert source.class_names[label] in name.split("/")
    if not prefix:
        assert names(ImageFolder(root, seed=1).load(False)) != names(test)
        assert names(ImageFolder(root).load(False)) == names(test)


def test_train_beside_test_or_alone(tmp_path):
    class_folders(tmp_path / "train", ["a", "b"], 2)
    class_folders(tmp_path / "test", ["a", "b"], 1)
    assert len(names(ImageFolder(tmp_path).load(False))) == 2
    class_folders(tmp_path / "other", ["train", "b"], 5)  # without val, a class like any other
    assert ImageFolder(tmp_path / "other").class_names == ["b", "train"]


def test_classes_txt_orders_and_chooses(tmp_path):
    class_folders(tmp_path, ["a", "b", "c"], 5)
    (tmp_path / "classes.txt").write_text("c\n\na \n", encoding="utf-8-sig")
    source = ImageFolder(tmp_path)
    assert source.class_names == ["c", "a"]
    assert count_classes("ImageFolder", tmp_path) == 2
    assert {name.split("/")[0] for name in names(source.load(True))} == {"a", "c"}
    (tmp_path / "classes.txt").write_text("a\nelephant")
    (problem,) = ImageFolder.preflight(tmp_path)
    assert "elephant" in problem and "classes.txt" in problem
    (tmp_path / "classes.txt").write_text("a\nb\na")
    with pytest.raises(DataError, match="names the class a twice"):
        ImageFolder(tmp_path)


def test_empty_folders_are_no_classes(tmp_path):
    class_folders(tmp_path, ["a", "b"], 5)
    (tmp_path / "empty").mkdir()
    assert ImageFolder(tmp_path).class_names == ["a", "b"]


def test_folders_that_are_no_data_set(tmp_path):
    assert "is not a folder" in ImageFolder.preflight(tmp_path / "gone")[0]
    assert "0 class folders" in ImageFolder.preflight(tmp_path)[0]
    assert count_classes("ImageFolder", tmp_path) is None
    class_folders(tmp_path, ["one"], 3)
    with pytest.raises(DataError, match="1 class folders with images"):
        ImageFolder(tmp_path)


def test_imagenet_a(tmp_path, monkeypatch):
    monkeypatch.setattr(imagenet_a, "NUM_CLASSES", 3)
    assert "imagenet-a.tar" in ImageNetA.preflight(tmp_path)[0]
    class_folders(tmp_path / "imagenet-a", ["n03", "n01", "n02"], 5)
    (tmp_path / "imagenet-a" / "README.txt").touch()
    source = ImageNetA(tmp_path)
    assert (source.class_names, source.split) == (["n01", "n02", "n03"], "seeded")
    assert (len(names(source.load(True))), len(names(source.load(False)))) == (12, 3)
    class_folders(tmp_path / "imagenet-a", ["n04"], 1)
    with pytest.raises(DataError, match="4 class folders instead of 3"):
        ImageNetA(tmp_path)


@pytest.fixture(params=["domainnet", ""])
def domains(tmp_path, request, monkeypatch):
    """Two domains of three classes, in a folder of their own or in dataroot."""
    monkeypatch.setattr(domainnet, "NUM_CLASSES", 3)
    for domain in ("clipart", "real"):
        class_folders(tmp_path / request.param / domain, ["axe", "bat", "cat"], 5)
    return tmp_path, request.param


def test_domainnet_with_the_official_lists(domains):
    root, prefix = domains
    for domain in ("clipart", "real"):
        for part, numbers in (("train", (0, 1, 2)), ("test", (3, 4))):
            lines = [
                f"{domain}/{name}/{n}.jpg {label}\n"
                for label, name in enumerate(["cat", "bat", "axe"])
                for n in numbers
            ]
            (root / prefix / f"{domain}_{part}.txt").write_text("".join(lines))
    source = DomainNet(root)
    assert (source.split, source.class_names) == ("official", ["cat", "bat", "axe"])
    train, test = source.load(True), source.load(False)
    assert (len(names(train)), len(names(test))) == (18, 12)
    assert train[0].missing() == [] and train[0].open(0).mode == "RGB"
    (root / prefix / "real_test.txt").write_text("real/cat/../../x.jpg 0\n")
    with pytest.raises(DataError, match="real_test.txt, line 1: expected"):
        DomainNet(root)


def test_domainnet_without_lists_splits_each_domain(domains, caplog):
    root, _ = domains
    source = DomainNet(root)
    assert source.split == "seeded" and "clipart_train.txt" in caplog.text
    tested = names(source.load(False))
    assert len(tested) == 6 and sum("clipart" in name for name in tested) == 3
    stream = build_stream(
        dataset="DomainNet", dataroot=root, image_size=16, first_split_size=2, other_split_size=2
    )
    assert [tuple(stream.classes(t)) for t in range(2)] == [(0, 2), (2, 3)]
    assert [stream.train_size(t) for t in range(2)] == [16, 8]


def test_domainnet_elsewhere_or_incomplete(tmp_path):
    assert "https://ai.bu.edu/M3SDA/" in DomainNet.preflight(tmp_path)[0]
    class_folders(tmp_path / "domainnet" / "real", ["axe"], 1)
    with pytest.raises(DataError, match="1 classes instead of 345"):
        DomainNet(tmp_path)


def test_image_folder_trains_with_the_general_test_crop(tmp_path):
    class_folders(tmp_path, ["a", "b"], 5)
    picture(0, (80, 40)).save(tmp_path / "a" / "0.jpg")
    stream = build_stream(
        dataset="ImageFolder", dataroot=tmp_path, image_size=16, first_split_size=1, other_split_size=1
    )
    assert stream.test_transform.crop == "center_crop"
    assert stream.test_transform(picture(0, (80, 40))).size == (16, 16)
