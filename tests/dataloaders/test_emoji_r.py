"""Emoji-R: the shipped files, and the stream made of them."""

import collections
import hashlib
import json

import numpy as np
import torch

from dataloaders.check import check_stream
from dataloaders.emoji_r import ARCHIVE, DATA_DIR, INDEX
from dataloaders.tasks import build_stream
from tests.dataloaders.conftest import config, pipeline

IMAGES = json.loads(INDEX.read_text(encoding="utf-8"))["images"]


def test_checksums_are_those_listed():
    listed = dict(line.split()[::-1] for line in (DATA_DIR / "SHA256SUMS").read_text().splitlines())
    assert listed == {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in (ARCHIVE, INDEX)}


def test_no_artist_is_on_both_sides_of_a_class():
    family = {"noto-emoji-font": "noto", "emojione-monotone": "emojione"}
    family["fluent-emoji-high-contrast"] = "fluent-emoji-flat"
    sides = {(row["label"], family.get(row["set"], row["set"]), row["split"]) for row in IMAGES}
    assert len(sides) == len({side[:2] for side in sides})


def test_every_set_is_credited():
    text = (DATA_DIR / "LICENSES.md").read_text(encoding="utf-8")
    for name, count in collections.Counter(row["set"] for row in IMAGES).items():
        assert f"| `{name}` | {count} |" in text


def test_the_stream_of_the_paper_size():
    settings = config(dataset="Emoji_R", first_split_size=20, other_split_size=20)
    stream = build_stream(settings, seed=0, image_size=64)
    report = check_stream(stream, "Emoji_R")
    assert (report["num_classes"], report["train"], report["split"], report["bad"]) == (200, 1221, "official", [])
    assert [task["test"] for task in report["tasks"]] == [60] * 10
    images, _ = next(pipeline(stream).test(3))
    raw = np.stack([np.asarray(stream.test_images.store.open(i)) for i in stream.test_indices(3)])
    assert torch.equal((images * 255).round().byte().permute(0, 2, 3, 1), torch.from_numpy(raw))
