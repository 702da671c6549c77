"""The check of a data set before a run."""

import json

from dataloaders.build import build_stream
from dataloaders.check import check_stream
from tests.dataloaders.conftest import class_folders
from tests.dataloaders.test_images import damaged_files


def check(root, **settings):
    stream = build_stream(
        dataset="ImageFolder",
        dataroot=root,
        image_size=16,
        **{"first_split_size": 1, "other_split_size": 2, **settings},
    )
    return json.loads(json.dumps(check_stream(stream, "ImageFolder", progress=False)))  # plain JSON


def test_a_good_folder(tmp_path):
    class_folders(tmp_path, ["a", "b", "ç"], 5)
    assert check(tmp_path) == {
        "dataset": "ImageFolder",
        "num_classes": 3,
        "split": "seeded",
        "train": 12,
        "test": 3,
        "tasks": [
            {"train": 4, "test": 1, "classes": ["a"]},
            {"train": 8, "test": 2, "classes": ["b", "ç"]},
        ],
        "bad": [],
    }


def test_all_damaged_images_are_found(tmp_path):
    class_folders(tmp_path, ["a", "b c"], 30)
    damaged = [f"b c/{number} {name}" for number in range(20) for name in damaged_files()]
    for path in damaged:
        (tmp_path / path).write_bytes(damaged_files()[path.split(" ", 2)[2]])
    (tmp_path / "a" / "gone.png").symlink_to("nowhere")
    result = check(tmp_path)
    assert result["bad"] == sorted([*damaged, "a/gone.png"])
    assert result["train"] + result["test"] == 261


def test_validation_looks_at_the_training_images_alone(tmp_path):
    class_folders(tmp_path / "train", ["a", "b"], 5)
    class_folders(tmp_path / "val", ["a", "b"], 5)
    (tmp_path / "val" / "a" / "0.jpg").write_bytes(b"")
    (tmp_path / "train" / "a" / "0.jpg").write_bytes(b"")
    assert check(tmp_path)["bad"] == ["train/a/0.jpg", "val/a/0.jpg"]
    result = check(tmp_path, validation=True)
    assert (result["train"], result["test"], result["bad"]) == (8, 2, ["train/a/0.jpg"])


def test_the_shipped_data_are_good():
    stream = build_stream(
        dataset="Emoji_R", dataroot="nowhere", image_size=64, first_split_size=20, other_split_size=20
    )
    result = check_stream(stream, "Emoji_R", progress=False)
    assert (result["num_classes"], len(result["tasks"]), result["bad"]) == (200, 10, [])
    assert result["test"] == 600 and [task["test"] for task in result["tasks"]] == [60] * 10
