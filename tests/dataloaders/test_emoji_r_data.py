"""The embedded Emoji-R archive: counts, checksums, and a split that no artist family straddles."""

import ast
import collections
import hashlib
import io
import json
import zipfile
from pathlib import Path

import pytest
from PIL import Image

FOLDER = Path(__file__).resolve().parents[2] / "dataloaders" / "data" / "emoji_r"
FAMILIES = [{"noto", "noto-emoji-font"}, {"emojione", "emojione-monotone"},
            {"fluent-emoji-flat", "fluent-emoji-high-contrast"}]


@pytest.fixture(scope="module")
def index():
    return json.loads((FOLDER / "index.json").read_text(encoding="utf-8"))


def test_checksums_hold():
    lines = (FOLDER / "SHA256SUMS").read_text().splitlines()
    assert {line.split()[1] for line in lines} == {"images.zip", "index.json"}
    for line in lines:
        expected, name = line.split()
        assert hashlib.sha256((FOLDER / name).read_bytes()).hexdigest() == expected, name


def test_counts(index):
    assert len(index["classes"]) == 200
    assert len({entry["name"] for entry in index["classes"]}) == 200
    assert len({entry["codepoint"] for entry in index["classes"]}) == 200
    splits = collections.Counter(row["split"] for row in index["images"])
    assert splits == {"train": 1221, "test": 600}
    per_class = collections.Counter((row["label"], row["split"]) for row in index["images"])
    assert all(per_class[label, "test"] == 3 and per_class[label, "train"] >= 5 for label in range(200))


def test_no_family_is_on_both_sides(index):
    sides = collections.defaultdict(set)
    for row in index["images"]:
        family = next((i for i, sets in enumerate(FAMILIES) if row["set"] in sets), row["set"])
        sides[row["label"], family].add(row["split"])
    assert all(len(found) == 1 for found in sides.values())


def test_archive_holds_the_images_of_the_index(index):
    assert (FOLDER / "images.zip").stat().st_size <= 4_000_000
    with zipfile.ZipFile(FOLDER / "images.zip") as archive:
        names = archive.namelist()
        assert names == sorted(row["file"] for row in index["images"])
        for name in names:
            image = Image.open(io.BytesIO(archive.read(name)))
            assert (image.size, image.mode, image.format) == ((64, 64), "RGB", "WEBP"), name


def test_no_two_images_are_equal(index):
    """The same picture under two labels, or on both sides, would make the accuracy mean less."""
    with zipfile.ZipFile(FOLDER / "images.zip") as archive:
        pixels = collections.defaultdict(list)
        for row in index["images"]:
            pixels[Image.open(io.BytesIO(archive.read(row["file"]))).tobytes()].append(row)
    repeated = [rows for rows in pixels.values() if len({(row["label"], row["split"]) for row in rows}) > 1]
    assert not repeated


def test_every_set_is_credited(index):
    text = (FOLDER / "LICENSES.md").read_text(encoding="utf-8")
    counts = collections.Counter(row["set"] for row in index["images"])
    assert len(counts) == 10
    for name, count in counts.items():
        assert f"| `{name}` | {count} |" in text


def test_versions_are_exact_and_agree():
    wanted = json.loads((FOLDER / "package.json").read_text())["dependencies"]
    locked = json.loads((FOLDER / "package-lock.json").read_text())["packages"]
    for name, version in wanted.items():
        assert locked[f"node_modules/{name}"]["version"] == version
    for line in (FOLDER / "requirements.txt").read_text().split():
        assert "==" in line


def test_builder_parses_with_a_docstring():
    """Its own requirements are not installed here, so it is read, not run."""
    assert "npm ci" in ast.get_docstring(ast.parse((FOLDER / "build.py").read_text(encoding="utf-8")))
