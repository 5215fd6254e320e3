"""Reading images and semantic masks for every layout."""

from __future__ import annotations

import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from data_pipeline.errors import DataError
from data_pipeline.sources.listing import UnusableError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
MASK_MODES = ("L", "P", "1")  # Pillow's names of one channel of at most eight bits


class Picture(NamedTuple):
    """An image file's bytes, their format (jpg, png, webp), and the size of the upright image in pixels."""

    data: bytes
    extension: str
    width: int
    height: int


def read_picture(path: Path) -> Picture:
    """The image of a file, decoded once to see that it can be.

    Raises:
        UnusableError: no such file, or not a JPEG, PNG or WebP that decodes.
    """
    from data_pipeline.decoding import decode_image  # brings torch, which a refused source should not wait for

    data = read_bytes(path)
    try:
        height, width = decode_image(data).shape[:2]
    except DataError as error:
        raise UnusableError(str(error)) from error
    return Picture(data, _format(data), width, height)


def read_bytes(path: Path) -> bytes:
    """A file's bytes; UnusableError where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UnusableError(f"{path.name}: cannot be read ({error.strerror})") from error


def _format(data: bytes) -> str:
    # By content: a file's name may lie, and readers choose their decoder by the extension in the shard.
    if data.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if data.startswith(b"\x89PNG"):
        return "png"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    raise UnusableError("neither JPEG, PNG nor WebP; convert it")


def read_mask(path: Path, width: int, height: int) -> np.ndarray:
    """(height, width) uint8: the values of a mask file; of a palette image the indexes.

    Raises:
        UnusableError: it cannot be read, has colours instead of values, or another size than the image.
    """
    try:
        with Image.open(io.BytesIO(read_bytes(path))) as mask:
            if mask.mode not in MASK_MODES:
                raise UnusableError(
                    f"{path.name}: a mask of mode {mask.mode}; one of indexes (palette or 8-bit grey) is needed"
                )
            values = np.asarray(mask, dtype=np.uint8)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, UnusableError):
            raise
        raise UnusableError(f"{path.name}: not a mask that can be decoded ({error})") from error
    if values.shape != (height, width):
        raise UnusableError(f"{path.name}: mask of {values.shape[1]} x {values.shape[0]}, image of {width} x {height}")
    return values


def encode_mask(values: np.ndarray) -> bytes:
    """PNG (8-bit grey) of (H, W) uint8 values."""
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG")
    return file.getvalue()
