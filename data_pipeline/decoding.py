"""Images to pixels: JPEG, PNG and WebP, upright, RGB, 8 bits, of any size up to a limit. Every command decodes here.

Decoding gives what Pillow's `convert("RGB")` after `exif_transpose` would: upright by the EXIF orientation, or by that
of XMP where EXIF has none; greyscale repeated over three channels, CMYK converted, the upper 8 of 16 bits, transparency
dropped, the first frame of an animation. An image of more than MAX_PIXELS is refused by its header, before memory is
taken for it. Formats are known by their content, whatever a file is called.

JPEG is decoded by libjpeg-turbo, PNG and WebP by Pillow. OpenCV would take 0.6 to 0.8 of Pillow's time for PNG and 0.3
to 0.9 for WebP, of 64 x 64 to 2048 x 1024 pixels; but versions of it, and torchvision, end the process on damaged files
of a few hundred bytes. Chunks of a PNG are checked first, as Pillow does not check those of pixels: a twentieth of the
time.
"""

from __future__ import annotations

import io
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL.Image
import simplejpeg
import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.errors import SampleError
from data_pipeline.files import read_file
from data_pipeline.in_hand import take

# Width times height; what Pillow, too, takes for an attack. Decoded it would be 0.5 GiB in each process.
MAX_PIXELS = 178_956_970
ORIENTATION_TAG = 0x0112
ORIENTATION_MARKS = (b"Exif\x00\x00", b"tiff:Orientation")  # of EXIF and XMP in a JPEG, which is not opened without
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
MASK_MODES = ("L", "P", "1")  # Pillow's names of one channel of at most eight bits
# What files of formats that are not read begin with, after so many bytes.
OTHER_FORMATS = (
    (0, b"GIF8", "GIF"), (0, b"BM", "BMP"), (0, b"II*\x00", "TIFF"), (0, b"MM\x00*", "TIFF"),
    (4, b"ftypheic", "HEIC"), (4, b"ftypheix", "HEIC"), (4, b"ftypmif1", "HEIF"), (4, b"ftypavif", "AVIF"),
    (0, b"\x00\x00\x00\x0cjP  ", "JPEG 2000"), (0, b"\xff\x0a", "JPEG XL"), (0, b"\x00\x00\x00\x0cJXL ", "JPEG XL"),
    (0, b"%PDF", "PDF"),
)  # fmt: skip


def image_format(data: bytes) -> str:
    """The format of an image file by its content, as the extension in shards: jpg, png or webp.

    Raises:
        SampleError: none of these.
    """
    # Not simplejpeg.is_jpeg: cameras append to their files, which then do not end as it asks.
    if data.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if data.startswith(PNG_SIGNATURE):
        return "png"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    for offset, start, name in OTHER_FORMATS:
        if data.startswith(start, offset):
            raise SampleError(f"is {name}, neither JPEG, PNG nor WebP; convert it")
    raise SampleError(f"not an image that can be decoded ({len(data)} bytes); use JPEG, PNG or WebP")


def decode_image(data: bytes, size: int | None = None) -> np.ndarray:
    """(H, W, 3) uint8 RGB of JPEG, PNG or WebP bytes, upright.

    With `size`, a JPEG may come at a half, a quarter or an eighth of its resolution, as long as both sides stay at
    or above `size`: libjpeg-turbo then skips most of the inverse transform.

    Raises:
        SampleError: the bytes are not an image, or one of more than MAX_PIXELS.
    """
    return _decode(data, size).pixels


def decode_oriented(data: bytes) -> tuple[np.ndarray, int]:
    """As `decode_image`, and the orientation 1..8 that was undone; 1 is an image that was upright as stored."""
    decoded = _decode(data, None)
    return decoded.pixels, decoded.orientation


def try_decode(path: Path) -> np.ndarray | SampleError:
    """(H, W, 3) uint8 RGB of an image file; or, as a value that other processes can give, why there is none."""
    take(str(path))
    try:
        return decode_image(read_file(path))
    except OSError as error:
        return SampleError(f"{path}: cannot be read ({error.strerror}); check its permissions")
    except SampleError as error:
        return SampleError(f"{path}: {error}")


def decode_canvas(data: bytes, size: int) -> tuple[Tensor, float]:
    """The canvas (3, size, size) uint8 of an image and the true image's aspect, width / height.

    Resized as Pillow's bilinear filter does it, antialiased; an image that is size x size already comes unchanged.

    Raises:
        SampleError: the bytes are not an image, or one of more than MAX_PIXELS.
    """
    array, aspect, _ = _decode(data, size)
    pixels = torch.from_numpy(array).permute(2, 0, 1)
    if pixels.shape[1:] != (size, size):
        # torch's uint8 kernel: a third of the time of OpenCV's INTER_AREA.
        pixels = F.interpolate(pixels[None], size=(size, size), mode="bilinear", antialias=True)[0]
    return pixels.contiguous(), aspect


def decode_indexes(data: bytes) -> np.ndarray:
    """(H, W) uint8: the values of a mask in PNG; of a palette image the indexes, of a bilevel one 0 and 1.

    Raises:
        SampleError: no PNG that can be decoded, colours instead of indexes, more than 8 bits or than MAX_PIXELS.
    """
    if not data.startswith(PNG_SIGNATURE):
        raise SampleError(f"not a mask that can be decoded ({len(data)} bytes); use PNG")
    with _opened(data, "PNG", "a mask") as image:
        if image.mode not in MASK_MODES:
            raise SampleError(f"a mask of mode {image.mode}; one of indexes (palette or 8-bit grey) is needed")
        return np.array(image, dtype=np.uint8)


class _Decoded(NamedTuple):
    pixels: np.ndarray  # (H, W, 3) uint8 RGB, upright
    aspect: float  # width / height of the full upright image
    orientation: int  # 1..8, as stored


def _decode(data: bytes, size: int | None) -> _Decoded:
    """An image, a JPEG possibly reduced to no less than `size`."""
    kind = image_format(data)
    if kind == "jpg":
        pixels, width, height = _decode_jpeg(data, size)
        orientation = _jpeg_orientation(data)
    else:
        with _opened(data, kind.upper(), "an image") as image:
            pixels = _rgb(image)
            orientation = _orientation(image)
        height, width = pixels.shape[:2]
    aspect = height / width if orientation >= 5 else width / height
    return _Decoded(_upright(pixels, orientation), aspect, orientation)


def _decode_jpeg(data: bytes, size: int | None) -> tuple[np.ndarray, int, int]:
    """Pixels of a JPEG, possibly reduced to no less than `size`, and the full image's width and height."""
    try:
        height, width = simplejpeg.decode_jpeg_header(data)[:2]
        _check_size(width, height)
        # Powers of two only: what lies between is slower than full resolution, or rounds the image's edge. The
        # accurate transform costs the same here and equals libjpeg's bit for bit.
        factor = next((factor for factor in (8, 4, 2) if size and min(height, width) >= factor * size), 1)
        pixels = simplejpeg.decode_jpeg(
            data,
            "RGB",
            fastdct=False,
            fastupsample=False,
            min_height=-(-height // factor),
            min_width=-(-width // factor),
            min_factor=factor,
        )
    except SampleError:
        raise
    except ValueError as error:
        raise SampleError(f"not an image that can be decoded ({error})") from error
    return pixels, width, height


@contextmanager
def _opened(data: bytes, kind: str, what: str) -> Iterator[PIL.Image.Image]:
    """The loaded image of PNG or WebP bytes; what Pillow raises on it becomes a SampleError.

    Args:
        kind: Pillow's name of the format.
        what: "an image", "a mask"; for the error.
    """
    try:
        if kind == "PNG":
            data = _sound_png(data, what)
        with warnings.catch_warnings(action="ignore"), PIL.Image.open(io.BytesIO(data), formats=(kind,)) as image:
            _check_size(*image.size)
            image.load()
            yield image
    except (SampleError, MemoryError):
        raise
    except PIL.Image.DecompressionBombError as error:
        raise SampleError(f"{what} of more than {MAX_PIXELS} pixels; leave it out") from error
    except Exception as error:  # Pillow's parsers raise many classes on damaged files
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise SampleError(f"not {what} that can be decoded ({reason}, {len(data)} bytes)") from error


def _sound_png(data: bytes, what: str) -> bytes:
    """The bytes of a PNG whose chunks are whole, without chunks of metadata that are damaged.

    Raises:
        SampleError: a chunk of pixels or the header is damaged, or the file is cut off.
    """
    view, position, damaged = memoryview(data), len(PNG_SIGNATURE), []
    kind = b""
    while kind != b"IEND":
        length, kind = int.from_bytes(view[position : position + 4]), bytes(view[position + 4 : position + 8])
        end = position + 12 + length
        if end > len(data):
            raise SampleError(f"not {what} that can be decoded (its PNG is cut off after {len(data)} bytes)")
        if position == len(PNG_SIGNATURE) and (kind, length) != (b"IHDR", 13):
            raise SampleError(f"not {what} that can be decoded (its PNG does not begin with a header)")
        if zlib.crc32(view[position + 4 : end - 4]) != int.from_bytes(view[end - 4 : end]):
            if not kind[0] & 32:  # a capital letter: a chunk that pixels depend on
                name = kind.decode("ascii", "replace")
                raise SampleError(f"not {what} that can be decoded (chunk {name!r} of its PNG is damaged)")
            damaged.append((position, end))
        position = end
    for start, end in reversed(damaged):
        data = data[:start] + data[end:]
    return data


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise SampleError(f"an image of {width} x {height}, more than {MAX_PIXELS} pixels; leave it out")


def _rgb(image: PIL.Image.Image) -> np.ndarray:
    """(H, W, 3) uint8 of a loaded image."""
    if image.mode.startswith("I"):  # grey of 16 bits, of which Pillow's conversion would not take the upper eight
        grey = (np.asarray(image) >> 8).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    return np.array(image.convert("RGB"))


def _jpeg_orientation(data: bytes) -> int:
    if not any(mark in data for mark in ORIENTATION_MARKS):
        return 1
    try:
        with warnings.catch_warnings(action="ignore"), PIL.Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            return _orientation(image)
    except Exception:  # Pillow's parsers raise many classes on damaged metadata, which leaves the picture readable
        return 1


def _orientation(image: PIL.Image.Image) -> int:
    """EXIF or XMP orientation 1..8; 1 where they say nothing that can be read."""
    try:
        orientation = image.getexif().get(ORIENTATION_TAG, 1)
    except Exception:  # Pillow's parsers raise many classes on damaged metadata, which leaves the picture readable
        return 1
    return orientation if orientation in range(1, 9) else 1


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Undo an EXIF orientation: 2..4 mirror or turn by 180 degrees, 5..8 also swap the axes."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)
