"""Any folder of class folders."""

import pytest

from dataloaders.base import DataError
from dataloaders.folders import find_images
from dataloaders.image_folder import ImageFolder
from tests.dataloaders.conftest import class_folders, config, names


def source(kind, root, seed=0):
    return kind(config(dataroot=root), seed=seed)


def test_what_counts_as_an_image(tmp_path):
    folder = tmp_path / "c"
    (folder / "deep" / "er").mkdir(parents=True)
    kept = ["a b.JPEG", "c.WebP", "deep/d.jpg", "deep/er/é.jpg", "ünï日本.png"]
    for name in [*kept, ".hidden.jpg", "notes.txt", "jpg"]:
        (folder / name).touch()
    (folder / "link.jpg").symlink_to("c.WebP")
    (folder / "gone.jpg").symlink_to("nowhere")
    (folder / "self.jpg").symlink_to("self.jpg")
    class_folders(tmp_path, ["elsewhere"], 1)
    (folder / "more").symlink_to(tmp_path / "elsewhere")
    (folder / "deep" / "loop").symlink_to(folder)
    found = list(find_images(tmp_path, "c"))
    assert found == sorted(f"c/{name}" for name in [*kept, "link.jpg", "gone.jpg", "more/0.jpg", "self.jpg"])


@pytest.mark.parametrize("prefix", ["", "train"])
def test_image_folder(tmp_path, prefix):
    root = tmp_path / "my data"
    class_folders(root / prefix, ["dog", "cat", "élan", ".git"], 5, ".JPEG")
    (root / prefix / "empty").mkdir()
    if prefix:
        class_folders(root / "test", ["cat", "dog", "élan", "unknown"], 2, ".png")
    folder = source(ImageFolder, root)
    assert folder.class_names == ["cat", "dog", "élan"]
    assert ImageFolder.count_classes(root) == 3
    train, test = folder.load(True), folder.load(False)
    assert folder.split == ("folder" if prefix else "seeded")
    assert (len(names(train)), len(names(test))) == ((15, 6) if prefix else (12, 3))
    assert not set(names(train)) & set(names(test))
    for part in (train, test):
        assert all(folder.class_names[label] in name for name, label in zip(names(part), part[1], strict=True))
    assert (names(source(ImageFolder, root, seed=1).load(False)) == names(test)) == bool(prefix)


def test_train_without_val_is_a_class_like_any_other(tmp_path):
    class_folders(tmp_path, ["train", "b", "c"], 5)
    assert source(ImageFolder, tmp_path).class_names == ["b", "c", "train"]
    with pytest.raises(DataError, match="0 class folders"):
        source(ImageFolder, tmp_path / "b")
