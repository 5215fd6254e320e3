from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.sources import UnusableError
from data_pipeline.sources.reading import encode_mask, read_mask, read_picture


@pytest.mark.parametrize(("kind", "extension"), [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp")])
def test_read_picture__the_format_is_that_of_the_content(tmp_path: Path, kind: str, extension: str):
    path = tmp_path / "misnamed.jpg"
    Image.new("RGB", (9, 7)).save(path, kind)
    assert read_picture(path) == (path.read_bytes(), extension, 9, 7, 1)


def test_read_picture__the_size_is_that_of_the_upright_image(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (9, 7)).save(tmp_path / "turned.jpg", exif=exif)
    assert read_picture(tmp_path / "turned.jpg")[2:] == (7, 9, 6)


def test_read_picture__what_readers_of_shards_could_not_name_is_left_out(tmp_path: Path):
    Image.new("RGB", (9, 7)).save(tmp_path / "a.jpg", "BMP")
    with pytest.raises(UnusableError, match="neither JPEG, PNG nor WebP"):
        read_picture(tmp_path / "a.jpg")


def test_read_picture__missing_and_damaged(tmp_path: Path):
    with pytest.raises(UnusableError, match="cannot be read"):
        read_picture(tmp_path / "absent.jpg")
    (tmp_path / "a.jpg").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(UnusableError, match="not an image that can be decoded"):
        read_picture(tmp_path / "a.jpg")


@pytest.mark.parametrize("mode", ["L", "P", "1"])
def test_read_mask__gives_values_not_colours(tmp_path: Path, mode: str):
    values = np.arange(12, dtype=np.uint8).reshape(3, 4) % (2 if mode == "1" else 12)
    image = Image.fromarray(values.astype(bool) if mode == "1" else values)
    if mode == "P":
        image.putpalette(list(reversed(range(256))) * 3)
    image.save(tmp_path / "mask.png")
    assert np.array_equal(read_mask(tmp_path / "mask.png", 4, 3), values)


def test_encode_mask__comes_back_as_grey_values():
    values = np.random.default_rng(0).integers(0, 256, (5, 6), np.uint8)
    image = Image.open(io.BytesIO(encode_mask(values)))
    assert image.mode == "L" and np.array_equal(np.asarray(image), values)


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\nrest", b"text"])
def test_read_mask__damaged(tmp_path: Path, content: bytes):
    (tmp_path / "mask.png").write_bytes(content)
    with pytest.raises(UnusableError, match=r"mask\.png: not a mask that can be decoded"):
        read_mask(tmp_path / "mask.png", 4, 3)


def test_read_mask__of_sixteen_bits(tmp_path: Path):
    Image.fromarray(np.zeros((3, 4), np.uint16)).save(tmp_path / "mask.png")
    with pytest.raises(UnusableError, match="mode I;16"):
        read_mask(tmp_path / "mask.png", 4, 3)
