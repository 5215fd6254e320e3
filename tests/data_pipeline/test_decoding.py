"""Images to pixels: every format and orientation, what is refused, and canvases."""

from __future__ import annotations

import io
import resource
import zlib

import cv2
import numpy as np
import pytest
import torch
from pictures import encoded, picture
from PIL import Image, ImageOps

from data_pipeline.decoding import MAX_PIXELS, decode_canvas, decode_image, decode_indexes, image_format
from data_pipeline.errors import DataError, SampleError

CANVAS = 24


@pytest.mark.parametrize(("kind", "options"), [("JPEG", {}), ("PNG", {}), ("WEBP", {"lossless": True})])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_decode_image__is_upright_by_exif_in_every_format(kind: str, options: dict, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(picture(), kind, exif=exif, **options)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert np.array_equal(decode_image(data), np.asarray(upright))
    assert decode_canvas(data, CANVAS)[1] == upright.width / upright.height


@pytest.mark.parametrize(
    ("mode", "kind", "tolerance"),
    [("L", "JPEG", 0), ("CMYK", "JPEG", 1), ("L", "PNG", 0), ("P", "PNG", 0), ("RGBA", "PNG", 0), ("1", "PNG", 0)],
)
def test_decode_image__other_colour_modes_become_rgb_as_pillow_makes_it(mode: str, kind: str, tolerance: int) -> None:
    data = encoded(picture().convert(mode), kind)
    wanted = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    assert np.abs(decode_image(data) - wanted).max() <= tolerance


def test_decode_image__sixteen_bits_become_eight() -> None:
    grey = np.asarray(picture().convert("L"))
    data = cv2.imencode(".png", grey.astype(np.uint16) * 257)[1].tobytes()
    assert np.array_equal(decode_image(data), np.repeat(grey[:, :, None], 3, axis=2))


def test_decode_image__bytes_after_the_end_of_a_jpeg_do_not_matter() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(picture(), exif=exif)
    assert np.array_equal(decode_image(data + b"appended by a camera"), decode_image(data))


def test_decode_image__a_damaged_exif_block_leaves_the_picture_readable() -> None:
    data = encoded(picture(), exif=b"Exif\x00\x00II*\x00\xff\xff\xff\x7f")
    assert decode_image(data).shape == (45, 60, 3)


@pytest.mark.parametrize(
    "data",
    [b"", b"hello", b"\xff\xd8\xff", encoded(picture())[:-300], encoded(picture(), "PNG")[:-300],
     encoded(picture(), "WEBP")[:-300]],
    ids=["empty", "text", "jpeg-start", "cut-jpeg", "cut-png", "cut-webp"],
)  # fmt: skip
def test_decode_image__refuses_what_is_damaged_in_one_line(data: bytes) -> None:
    with pytest.raises(DataError, match="not an image that can be decoded") as error:
        decode_image(data)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_decode_canvas__an_image_of_the_canvas_size_is_unchanged(kind: str) -> None:
    data = encoded(picture(CANVAS, CANVAS), kind)
    pixels, aspect = decode_canvas(data, CANVAS)
    assert np.array_equal(pixels.permute(1, 2, 0), np.asarray(Image.open(io.BytesIO(data))))
    assert aspect == 1


@pytest.mark.parametrize("size", [(501, 333), (60, 45), (10, 200), (200, 10), (12, 9)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_decode_canvas__squashes_any_shape_as_an_antialiased_resize(size: tuple[int, int], kind: str) -> None:
    data = encoded(picture(*size), kind)
    pixels, aspect = decode_canvas(data, CANVAS)
    wanted = np.asarray(Image.open(io.BytesIO(data)).resize((CANVAS, CANVAS), Image.Resampling.BILINEAR))
    assert pixels.shape == (3, CANVAS, CANVAS) and pixels.dtype == torch.uint8
    difference = np.abs(pixels.permute(1, 2, 0).numpy().astype(int) - wanted)
    # A JPEG may come reduced by libjpeg, which is another filter.
    assert difference.max() <= 1 if kind == "PNG" else difference.mean() < 4
    assert aspect == size[0] / size[1]  # of the image itself, not of a reduced decode


def bomb(kind: str) -> bytes:
    """A small file whose header names 30 000 x 30 000 pixels, more than 0.9 gigapixels."""
    data = bytearray(encoded(picture(), kind, **({"lossless": True} if kind == "WEBP" else {})))
    if kind == "JPEG":
        frame = data.index(b"\xff\xc0")
        data[frame + 5 : frame + 9] = (30_000).to_bytes(2) * 2
    elif kind == "PNG":
        data[16:24] = (30_000).to_bytes(4) * 2
        data[29:33] = zlib.crc32(data[12:29]).to_bytes(4)
    elif kind == "WEBP":
        side = (1 << 14) - 1  # the format's largest
        data[21:25] = (int.from_bytes(data[21:25], "little") & ~((1 << 28) - 1) | side | side << 14).to_bytes(
            4, "little"
        )
    return bytes(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_decode_image__a_decompression_bomb_is_refused_by_its_header(kind: str) -> None:
    data = bomb(kind)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for size in (None, 16):
        with pytest.raises(SampleError, match=f"more than {MAX_PIXELS} pixels; leave it out"):
            decode_image(data, size)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024  # KiB


def test_decode_image__sixteen_bit_colours_become_eight() -> None:
    colours = np.asarray(picture())
    data = cv2.imencode(".png", colours[:, :, ::-1].astype(np.uint16) * 257)[1].tobytes()
    assert np.array_equal(decode_image(data), colours)


def chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    """Kind and content of each chunk of a PNG."""
    found, position = [], 8
    while position < len(data):
        length = int.from_bytes(data[position : position + 4])
        found.append((data[position + 4 : position + 8], data[position + 8 : position + 8 + length]))
        position += 12 + length
    return found


def png_of(parts: list[tuple[bytes, bytes]]) -> bytes:
    """A PNG of chunks, each with the right checksum."""
    whole = (len(body).to_bytes(4) + kind + body + zlib.crc32(kind + body).to_bytes(4) for kind, body in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(whole)


def test_decode_image__an_animated_png_with_a_damaged_first_frame_is_refused() -> None:
    """Decoders have ended the process on it."""
    frames = [picture(seed=seed) for seed in range(2)]
    data = encoded(frames[0], "PNG", save_all=True, append_images=frames[1:])
    assert np.array_equal(decode_image(data), np.asarray(frames[0]))
    broken = [(kind, body[:9] if kind == b"IDAT" else body) for kind, body in chunks(data)]
    for damaged in (png_of(broken), png_of(broken[:-1]), png_of(broken[:4])):
        with pytest.raises(SampleError, match="not an image that can be decoded"):
            decode_image(damaged)


@pytest.mark.parametrize("kind", [b"IHDR", b"IDAT", b"IEND"])
def test_decode_image__a_flipped_bit_in_a_checksum_of_a_png_is_found(kind: bytes) -> None:
    data = bytearray(encoded(picture(), "PNG"))
    data[data.index(kind) - 4 + 8 + int.from_bytes(data[data.index(kind) - 4 : data.index(kind)])] ^= 1
    with pytest.raises(SampleError, match=f"chunk '{kind.decode()}' of its PNG is damaged"):
        decode_image(bytes(data))


def test_decode_image__damaged_metadata_of_a_png_leaves_the_picture_readable() -> None:
    text = bytearray(encoded(picture(), "PNG", dpi=(300, 300)))
    text[text.index(b"pHYs") + 5] ^= 1
    assert np.array_equal(decode_image(bytes(text)), np.asarray(picture()))


def test_decode_image__sixteen_bits_lose_their_lower_eight() -> None:
    grey = np.array([[0x12FF, 0xFE00], [0x0080, 0xFFFF]], np.uint16)
    upper = np.array([[0x12, 0xFE], [0x00, 0xFF]], np.uint8)
    for deep in (grey, np.stack([grey] * 3, axis=2)):
        pixels = decode_image(cv2.imencode(".png", deep)[1].tobytes())
        assert np.array_equal(pixels, np.stack([upper] * 3, axis=2))


@pytest.mark.parametrize("kind", ["WEBP", "PNG"])
def test_decode_image__an_animation_gives_its_first_frame(kind: str) -> None:
    frames = [picture(seed=seed) for seed in range(3)]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
    assert np.array_equal(decode_image(data), np.asarray(frames[0]))


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "AVIF"])
def test_image_format__other_formats_are_refused_by_what_they_are(kind: str) -> None:
    data = encoded(picture(), kind)
    for function in (image_format, decode_image):
        with pytest.raises(SampleError, match=f"is {kind}, neither JPEG, PNG nor WebP; convert it"):
            function(data)


XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


@pytest.mark.parametrize(("kind", "options"), [("JPEG", {}), ("WEBP", {"lossless": True})])
def test_decode_image__is_upright_by_xmp_where_exif_says_nothing(kind: str, options: dict) -> None:
    data = encoded(picture(), kind, xmp=XMP, **options)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert upright.size == (45, 60)
    assert np.array_equal(decode_image(data), np.asarray(upright))


def test_decode_indexes__gives_values_of_palette_grey_and_bilevel_masks() -> None:
    values = np.arange(12, dtype=np.uint8).reshape(3, 4)
    palette = Image.fromarray(values, "P")
    palette.putpalette(list(range(255, -1, -1)) * 3)
    for mask in (Image.fromarray(values), palette):
        assert np.array_equal(decode_indexes(encoded(mask, "PNG")), values)
    assert np.array_equal(decode_indexes(encoded(Image.fromarray(values > 5), "PNG")), values > 5)


@pytest.mark.parametrize(
    ("data", "words"),
    [(b"", "not a mask"), (encoded(picture()), "use PNG"), (encoded(picture(), "PNG"), "mode RGB"),
     (encoded(picture().convert("L"), "PNG")[:-40], "cut off")],
    ids=["empty", "jpeg", "colours", "cut"],
)  # fmt: skip
def test_decode_indexes__refuses_what_is_no_mask(data: bytes, words: str) -> None:
    with pytest.raises(SampleError, match=words):
        decode_indexes(data)
