"""Icon-R: the shipped files, and the stream made of them."""

import csv
import hashlib

import numpy as np
import torch

from dataloaders.check import check_stream
from dataloaders.icon_r import DATA_DIR, INDEX
from dataloaders.tasks import build_stream
from tests.dataloaders.conftest import config, pipeline


def table(file):
    with file.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines, delimiter="\t"))


PICTURES, SETS = table(INDEX), {row["set"]: row for row in table(DATA_DIR / "sets.tsv")}


def test_checksums_are_those_listed():
    listed = dict(line.split()[::-1] for line in (DATA_DIR / "SHA256SUMS").read_text().splitlines())
    assert listed == {name: hashlib.sha256((DATA_DIR / name).read_bytes()).hexdigest() for name in listed}
    assert {"images.zip", "index.tsv", "sets.tsv"} <= {*listed}


def test_no_designer_is_on_both_sides_of_a_class():
    sides = {(row["label"], SETS[row["set"]]["family"], row["split"]) for row in PICTURES}
    assert len(sides) == len({side[:2] for side in sides})


def test_every_set_is_credited():
    text = (DATA_DIR / "LICENSES.md").read_text(encoding="utf-8")
    for row in (SETS[name] for name in {row["set"] for row in PICTURES}):
        assert row["author"] and row["source"] and f"## {row['licence']}\n" in text


def test_the_stream_of_the_paper_size():
    settings = config(dataset="Icon_R", first_split_size=20, other_split_size=20)
    stream = build_stream(settings, seed=0, image_size=64)
    report = check_stream(stream, "Icon_R")
    counts = [sum(row["split"] == part for row in PICTURES) for part in ("train", "test")]
    assert (report["num_classes"], report["train"], report["split"], report["bad"]) == (200, counts[0], "official", [])
    assert sum(task["test"] for task in report["tasks"]) == counts[1] > 2500
    images, _ = next(pipeline(stream).test(3))
    raw = np.stack([np.asarray(stream.test_images.store.open(i)) for i in stream.test_indices(3)[: len(images)]])
    assert torch.equal((images * 255).round().byte().permute(0, 2, 3, 1), torch.from_numpy(raw))
