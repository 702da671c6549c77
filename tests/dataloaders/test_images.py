"""Image files of every kind are read as upright RGB, and damaged ones are named."""

import io
import os
import pickle

import numpy as np
import pytest
from PIL import Image

from dataloaders.base import ArrayStore, BadImageError, FileStore, read_image
from tests.dataloaders.conftest import picture


def saved(image: Image.Image, suffix: str, **options) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, suffix, **options)
    file.seek(0)
    return file


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("L", "png"), ("1", "png"), ("P", "png"), ("P", "gif"), ("LA", "png"), ("F", "tiff"), ("RGB", "bmp")]
    + [("RGBA", "webp"), ("CMYK", "jpeg"), ("CMYK", "tiff"), ("YCbCr", "jpeg"), ("LAB", "tiff"), ("RGB", "ppm")],
)
def test_every_mode_becomes_rgb(mode, suffix):
    image = picture(1).convert(mode)
    options = {"transparency": bytes([0, 128, 255])} if (mode, suffix) == ("P", "png") else {}
    read = read_image(saved(image, suffix, **options))
    assert (read.mode, read.size) == ("RGB", image.size)
    if mode in ("L", "1", "P", "RGB"):
        assert np.array_equal(read, image.convert("RGB"))


def test_16_bits_are_scaled_and_not_clipped():
    image = Image.fromarray(np.array([[0, 256, 32768, 65535]], dtype=np.uint16))
    for suffix in ("png", "tiff"):
        assert np.asarray(read_image(saved(image, suffix)))[0, :, 0].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize("suffix", ["jpeg", "png", "webp", "tiff"])
def test_exif_orientation_is_undone(suffix):
    upright = Image.new("RGB", (16, 8), (250, 250, 250))
    upright.paste((10, 10, 10), (0, 0, 8, 4))  # dark upper left corner
    turns = "FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_90", "TRANSVERSE", "ROTATE_270"
    for orientation, turn in enumerate(turns, start=2):
        exif = Image.Exif()
        exif[0x0112] = orientation
        read = np.asarray(read_image(saved(upright.transpose(Image.Transpose[turn]), suffix, exif=exif)))
        assert read.shape == (8, 16, 3)
        assert read[:3, :7].max() < 60 and read[5:].min() > 200 and read[:, 9:].min() > 200, turn


def damaged_files() -> dict[str, bytes]:
    whole = {suffix: saved(picture(0, (64, 48)), suffix).getvalue() for suffix in ("jpeg", "png", "webp")}
    damaged = {f"half.{suffix}": content[: len(content) // 2] for suffix, content in whole.items()}
    damaged |= {"empty.jpg": b"", "page.png": b"<!DOCTYPE html>", "header.jpg": whole["jpeg"][:20]}
    return damaged | {"crc.png": whole["png"][:20] + b"\xff\xff" + whole["png"][22:]}


@pytest.mark.parametrize("name", [*damaged_files(), "missing.jpg", "folder.jpg"])
def test_images_that_cannot_be_read_are_named(tmp_path, name):
    (tmp_path / "folder.jpg").mkdir()
    for damaged, content in damaged_files().items():
        (tmp_path / damaged).write_bytes(content)
    with pytest.raises(BadImageError, match=f"cannot read the image .*{name}: .") as caught:
        FileStore(tmp_path, [name]).open(0)
    assert "\n" not in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)  # it comes from a worker


def test_no_file_is_handed_to_another_program():
    """Pillow reads EPS by Ghostscript."""
    with pytest.raises(BadImageError, match="one of JPEG"):
        read_image(saved(picture(0), "eps"), "picture.jpg")


def test_stores_know_names_and_what_is_missing(tmp_path):
    (tmp_path / "a").mkdir()
    picture(0).save(tmp_path / "a" / "1.png")
    paths = ["a/1.png", os.fsdecode(b"a/\xe9 \xff.png"), "b/日本 語.png"]  # the second is not UTF-8
    store = pickle.loads(pickle.dumps(FileStore(tmp_path, paths)))
    assert [store.name(i) for i in range(len(store))] == paths and store.missing() == paths[1:]
    assert str(BadImageError(paths[1], "gone")).encode()
    arrays = ArrayStore(np.stack([np.asarray(picture(i)) for i in range(3)]), "part")
    assert np.array_equal(arrays.open(2), picture(2)) and arrays.name(2) == "part[2]"
    others = ArrayStore(np.stack([np.asarray(picture(i)) for i in (0, 2, 1)]), "part")
    assert arrays.digest() != others.digest()
