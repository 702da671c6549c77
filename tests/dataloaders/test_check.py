"""The check of a data set before a run."""

from dataloaders.check import check_stream
from dataloaders.tasks import build_stream
from tests.dataloaders.conftest import class_folders, config
from tests.dataloaders.test_images import damaged_files


def test_the_report_counts_what_a_run_would_use_and_names_bad_images(tmp_path):
    for part in ("train", "val"):
        class_folders(tmp_path / part, ["a", "b", "ç"], 10)
        for name, content in damaged_files().items():
            (tmp_path / part / "b" / name).write_bytes(content)
    bad = sorted(f"{part}/b/{name}" for name in damaged_files() for part in ("train", "val"))
    for validation in (False, True):
        settings = config(dataset="ImageFolder", dataroot=tmp_path, validation=validation)
        report = check_stream(build_stream(settings, seed=0, image_size=16), "ImageFolder")
        last_task = {"train": 8, "test": 2} if validation else {"train": 10, "test": 10}
        assert report["tasks"][1] == {**last_task, "classes": ["ç"]}
        assert report["bad"] == [name for name in bad if name.startswith("train") or not validation]
    assert (report["dataset"], report["num_classes"], report["split"]) == ("ImageFolder", 3, "folder")
    assert report["train"] + report["test"] == 30 + len(damaged_files())
