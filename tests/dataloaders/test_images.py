"""Image files of every kind are read as upright RGB, and damaged ones are named."""

import io
import os
import pickle
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from dataloaders.base import (
    ArrayStore,
    BadImageError,
    FileStore,
    PathArray,
    as_rgb,
    load_rows,
    open_image,
    read_image,
)
from tests.dataloaders.conftest import picture


def saved(image: Image.Image, suffix: str, **options) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, suffix, **options)
    file.seek(0)
    return file


@pytest.mark.parametrize("suffix", ["png", "webp", "bmp", "ppm", "tiff", "gif"])
def test_lossless_formats_keep_their_pixels(suffix):
    image = picture(0).quantize(8).convert("RGB")
    read = read_image(saved(image, suffix, **({"lossless": True} if suffix == "webp" else {})))
    assert read.mode == "RGB"
    assert np.array_equal(read, image)


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("L", "png"), ("L", "jpeg"), ("1", "png"), ("P", "png"), ("P", "gif"), ("LA", "png")]
    + [("RGBA", "png"), ("RGBA", "webp"), ("CMYK", "jpeg"), ("CMYK", "tiff"), ("YCbCr", "jpeg")]
    + [("LAB", "tiff"), ("F", "tiff")],
)
def test_every_mode_becomes_rgb(mode, suffix):
    rgb = picture(1)
    image = rgb.convert("LAB") if mode == "LAB" else rgb.convert(mode)
    read = read_image(saved(image, suffix))
    assert (read.mode, read.size) == ("RGB", image.size)
    if mode in ("L", "1", "LA", "F"):
        assert np.ptp(np.asarray(read), axis=2).max() == 0  # still grey


@pytest.mark.filterwarnings("error")
def test_a_palette_with_transparency_is_read_without_a_warning():
    image = picture(2).quantize(8)
    file = saved(image, "png", transparency=bytes([0, 128, 255, 255]))
    assert np.array_equal(read_image(file), image.convert("RGB"))


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_16_bits_are_scaled_and_not_clipped(suffix):
    values = np.array([[0, 256, 32768, 65535]], dtype=np.uint16)
    read = np.asarray(read_image(saved(Image.fromarray(values), suffix)))
    assert read.shape == (1, 4, 3)
    assert read[0, :, 0].tolist() == [0, 1, 128, 255]


def test_16_bit_colour():
    rows = b"".join(b"\0" + struct.pack(">6H", 0, 32768, 65535, 65535, 0, 256) for _ in range(2))
    header = struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
    assert np.asarray(read_image(io.BytesIO(png)))[0].tolist() == [[0, 128, 255], [255, 0, 1]]


@pytest.mark.parametrize("suffix", ["jpeg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(suffix, orientation):
    image = Image.new("RGB", (16, 8), (250, 250, 250))
    image.paste((10, 10, 10), (0, 0, 8, 4))  # dark upper left corner
    turn = {
        1: [],
        2: [Image.Transpose.FLIP_LEFT_RIGHT],
        3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE],
        6: [Image.Transpose.ROTATE_90],
        7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_270],
    }[orientation]
    stored = image
    for step in turn:
        stored = stored.transpose(step)
    exif = Image.Exif()
    exif[0x0112] = orientation
    read = np.asarray(read_image(saved(stored, suffix, exif=exif)))
    assert read.shape == (8, 16, 3)
    assert read[:3, :7].max() < 60 and read[5:].min() > 200 and read[:, 9:].min() > 200


def test_an_upright_rgb_image_is_not_copied():
    image = picture(0)
    assert as_rgb(image) is image


def damaged_files() -> dict[str, bytes]:
    jpeg = saved(picture(0, (64, 48)), "jpeg").getvalue()
    png = saved(picture(0, (64, 48)), "png").getvalue()
    webp = saved(picture(0, (64, 48)), "webp").getvalue()
    return {
        "empty.jpg": b"",
        "text.jpg": b"this is no image",
        "page.png": b"<!DOCTYPE html><html><body>404</body></html>",
        "half.jpg": jpeg[: len(jpeg) // 2],
        "header.jpg": jpeg[:20],
        "half.png": png[: len(png) // 2],
        "crc.png": png[:20] + b"\xff\xff" + png[22:],
        "zeros.png": png[:60] + bytes(len(png) - 60),
        "half.webp": webp[: len(webp) // 2],
        "zeros.jpg": bytes(1000),
    }


@pytest.mark.parametrize("name", damaged_files())
def test_damaged_images_are_named(tmp_path, name):
    (tmp_path / name).write_bytes(damaged_files()[name])
    with pytest.raises(BadImageError, match=name) as caught:
        FileStore(tmp_path, [name]).open(0)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_no_damage_to_any_byte_is_anything_but_a_named_error():
    rng = np.random.default_rng(0)
    suffixes = ("jpeg", "png", "webp", "gif", "tiff")
    files = [saved(picture(0, (24, 16)), suffix).getvalue() for suffix in suffixes]
    for trial in range(200):
        content = bytearray(files[trial % len(files)])
        for position in rng.integers(0, len(content), 6):
            content[position] = rng.integers(0, 256)
        try:
            assert read_image(io.BytesIO(content[: rng.integers(1, len(content) + 1)]), "x").mode == "RGB"
        except BadImageError as error:
            assert str(error).startswith("cannot read the image x: ")


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: None, "no such file"),
        (lambda path: path.mkdir(), "not a file"),
        (lambda path: path.symlink_to("nowhere.png"), "no such file"),
        (lambda path: path.touch(), "the file is empty"),
    ],
)
def test_what_is_not_there_is_said_so(tmp_path, make, reason):
    make(tmp_path / "x.png")
    with pytest.raises(BadImageError, match=reason):
        read_image(tmp_path / "x.png")


def test_the_error_of_a_name_that_is_no_text_can_be_printed():
    error = BadImageError(os.fsdecode(b"d/\xe9.jpg"), "the file is empty")
    assert str(error).encode() == b"cannot read the image d/?.jpg: the file is empty"


def test_the_error_pickles():
    error = pickle.loads(pickle.dumps(BadImageError("a b.jpg", "the file is empty")))
    assert str(error) == "cannot read the image a b.jpg: the file is empty"


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"quality": 30}])
@pytest.mark.parametrize("rows", [1, 7, 60, 61])
def test_upper_rows_of_a_jpeg_file_are_as_in_the_whole(tmp_path, options, rows):
    path = str(tmp_path / "x.jpg")
    picture(0, (83, 61)).save(path, **options)
    image = open_image(path)
    assert image.tile  # not decoded yet
    upper = np.asarray(load_rows(image, rows).crop((0, 0, 83, rows)))
    assert np.array_equal(upper, np.asarray(read_image(path))[:rows])
    assert load_rows(image, 61) is image  # once is enough


def test_black_rows_are_not_taken_for_damage(tmp_path):
    image = picture(0, (64, 48))
    image.paste((0, 0, 0), (0, 16, 64, 32))
    image.save(tmp_path / "x.jpg", quality=95)
    whole = read_image(tmp_path / "x.jpg")
    for rows in (20, 30, 40):
        upper = load_rows(open_image(str(tmp_path / "x.jpg")), rows)
        assert np.array_equal(np.asarray(upper)[:rows], np.asarray(whole)[:rows])


def test_other_files_are_decoded_at_once(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(0).convert("L").save(tmp_path / "grey.jpg")
    picture(0).save(tmp_path / "turned.jpg", exif=exif)
    picture(0).save(tmp_path / "x.png")
    for name in ("grey.jpg", "turned.jpg", "x.png"):
        image = open_image(str(tmp_path / name))
        assert not getattr(image, "tile", None)
        assert np.array_equal(image, read_image(tmp_path / name))


@pytest.mark.parametrize("name", damaged_files())
def test_damage_is_found_whatever_part_is_asked_for(tmp_path, name):
    (tmp_path / name).write_bytes(damaged_files()[name])
    for rows in (1, 20, 48):
        with pytest.raises(BadImageError, match=name):
            load_rows(open_image(str(tmp_path / name)), rows)


def test_an_error_of_the_decoder_is_not_taken_for_the_early_end(tmp_path):
    content = bytearray(saved(picture(0, (64, 48)), "jpeg").getvalue())
    table = content.index(b"\xff\xc4")
    content[table + 5 : table + 21] = bytes([255] * 16)  # a Huffman table with more codes than there can be
    (tmp_path / "x.jpg").write_bytes(content)
    with pytest.raises(BadImageError):
        read_image(tmp_path / "x.jpg")
    with pytest.raises(BadImageError):
        load_rows(open_image(str(tmp_path / "x.jpg")), 20)


def test_path_array_holds_any_name_in_little_memory():
    names = ["a/b.jpg", "", "päth/日本 語.png", os.fsdecode(b"latin/\xe9.jpg"), "z"]
    paths = pickle.loads(pickle.dumps(PathArray(names)))
    assert list(paths) == names
    many = PathArray(f"imagenet-r/n01443537/sculpture_{i}.jpg" for i in range(30_000))
    assert len(pickle.dumps(many)) < 2_000_000
    assert many[29_999] == "imagenet-r/n01443537/sculpture_29999.jpg"


def test_file_store_lists_what_is_missing(tmp_path):
    (tmp_path / "a").mkdir()
    picture(0).save(tmp_path / "a" / "1.png")
    store = FileStore(tmp_path, ["a/1.png", "a/2.png", "b/1.png"])
    assert store.missing() == ["a/2.png", "b/1.png"]
    assert store.name(1) == "a/2.png"


def test_array_store():
    store = ArrayStore(np.stack([np.asarray(picture(i)) for i in range(3)]), "part")
    assert np.array_equal(store.open(2), picture(2))
    assert (len(store), store.name(2), store.missing()) == (3, "part[2]", [])
