"""Images to pixels: JPEG, PNG and WebP, upright, RGB, 8 bits, of any size up to a limit.

Decoding gives what Pillow's `convert("RGB")` after `exif_transpose` would: upright by the EXIF orientation,
greyscale repeated over three channels, CMYK converted, 16 bits reduced to 8, transparency dropped. An image of more
than MAX_PIXELS is refused by its header, before memory is taken for it.
"""

from __future__ import annotations

import io
import warnings

import cv2
import numpy as np
import PIL.Image
import simplejpeg
import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.errors import SampleError

# Width times height; what Pillow, too, takes for an attack. Decoded it would be 0.5 GiB in each process.
MAX_PIXELS = 178_956_970
ORIENTATION_TAG = 0x0112
JPEG_START = b"\xff\xd8\xff"
PNG_START = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR"
LOG_LEVEL_ERROR = 2  # of OpenCV
# What an EXIF block opens with, by whether the file is a JPEG; the others are PNG and WebP.
EXIF_MARKS = {True: (b"Exif\x00\x00",), False: (b"eXIf", b"EXIF")}

# OpenCV prints a warning on damaged files, for which we raise an error with the sample's name.
getattr(cv2.utils, "logging", cv2).setLogLevel(LOG_LEVEL_ERROR)  # where OpenCV 5 has it, and where OpenCV 4 does


def decode_image(data: bytes, size: int | None = None) -> np.ndarray:
    """(H, W, 3) uint8 RGB of JPEG, PNG or WebP bytes, upright.

    With `size`, a JPEG may come at a half, a quarter or an eighth of its resolution, as long as both sides stay at
    or above `size`: libjpeg-turbo then skips most of the inverse transform.

    Raises:
        SampleError: the bytes are not an image, or one of more than MAX_PIXELS.
    """
    return _decode(data, size)[0]


def decode_canvas(data: bytes, size: int) -> tuple[Tensor, float]:
    """The canvas (3, size, size) uint8 of an image and the true image's aspect, width / height.

    Resized as Pillow's bilinear filter does it, antialiased; an image that is size x size already comes unchanged.

    Raises:
        SampleError: the bytes are not an image, or one of more than MAX_PIXELS.
    """
    array, aspect = _decode(data, size)
    pixels = torch.from_numpy(array).permute(2, 0, 1)
    if pixels.shape[1:] != (size, size):
        # torch's uint8 kernel: a third of the time of OpenCV's INTER_AREA.
        pixels = F.interpolate(pixels[None], size=(size, size), mode="bilinear", antialias=True)[0]
    return pixels.contiguous(), aspect


def _decode(data: bytes, size: int | None) -> tuple[np.ndarray, float]:
    """Upright pixels, a JPEG's possibly reduced to no less than `size`, and the full image's width / height."""
    # Not simplejpeg.is_jpeg: cameras append to their files, which then do not end as it asks.
    is_jpeg = data.startswith(JPEG_START)
    try:
        if is_jpeg:
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
        else:
            _check_size(*_size_in_header(data))
            flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
            pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
            height, width = (0, 0) if pixels is None else pixels.shape[:2]
    except SampleError:
        raise
    except ValueError as error:
        raise SampleError(f"not an image that can be decoded ({error})") from error
    except cv2.error as error:
        raise SampleError(f"not an image that can be decoded ({error.err})") from error
    if pixels is None:
        raise SampleError(f"not an image that can be decoded ({len(data)} bytes); use JPEG, PNG or WebP")
    orientation = _orientation(data) if any(mark in data for mark in EXIF_MARKS[is_jpeg]) else 1
    aspect = height / width if orientation >= 5 else width / height
    return _upright(pixels, orientation), aspect


def _size_in_header(data: bytes) -> tuple[int, int]:
    """Width and height that the header of an image other than a JPEG names, without decoding it."""
    if data.startswith(PNG_START):
        return int.from_bytes(data[16:20]), int.from_bytes(data[20:24])
    try:
        with warnings.catch_warnings(action="ignore"), PIL.Image.open(io.BytesIO(data)) as image:
            return image.size
    except PIL.Image.DecompressionBombError as error:
        raise SampleError(f"an image of more than {MAX_PIXELS} pixels; leave it out") from error
    except Exception as error:  # Pillow's parsers raise many classes on damaged headers
        raise SampleError(f"not an image that can be decoded ({len(data)} bytes); use JPEG, PNG or WebP") from error


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise SampleError(f"an image of {width} x {height}, more than {MAX_PIXELS} pixels; leave it out")


def _orientation(data: bytes) -> int:
    """EXIF orientation 1..8; 1 where the EXIF block is damaged, which leaves the picture readable."""
    try:
        with warnings.catch_warnings(action="ignore"):
            orientation = PIL.Image.open(io.BytesIO(data)).getexif().get(ORIENTATION_TAG, 1)
    except Exception:  # Pillow's parsers raise many classes on damaged metadata
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
