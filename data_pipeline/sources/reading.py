"""Reading images and semantic masks for every layout."""

from __future__ import annotations

import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from data_pipeline.errors import DataError, SampleError
from data_pipeline.files import read_file
from data_pipeline.sources.listing import UnusableError


class Picture(NamedTuple):
    """An image file's bytes, their format (jpg, png, webp), and the size of the upright image in pixels.

    The first four are those of a `Sample`.
    """

    data: bytes
    extension: str
    width: int
    height: int
    orientation: int  # 1..8 by EXIF or XMP; 1 is upright as stored


def read_picture(path: Path) -> Picture:
    """The image of a file, decoded once to see that it can be.

    Raises:
        UnusableError: no such file, or not a JPEG, PNG or WebP that decodes.
    """
    # Brings torch, which a refused source should not wait for.
    from data_pipeline.decoding import decode_oriented, image_format

    data = read_bytes(path)
    try:
        pixels, orientation = decode_oriented(data)
        return Picture(data, image_format(data), pixels.shape[1], pixels.shape[0], orientation)
    except DataError as error:
        raise UnusableError(str(error)) from error


def refuse_turned(picture: Picture, noted: tuple[int, int] | None) -> None:
    """See that annotations of an image are of its upright pixels, where EXIF or XMP turns it.

    Programs that draw boxes differ in whether they turn the picture first. The size tells, where a quarter turn
    changes it; nothing tells of half a turn, of mirroring, or of a square.

    Args:
        noted: width and height of which the annotation speaks; None where it does not say.

    Raises:
        UnusableError: they may be of the pixels as stored.
    """
    upright = picture.width, picture.height
    if picture.orientation == 1 or (picture.orientation >= 5 and noted == upright and picture.width != picture.height):
        return
    speaks = f"its annotation of {noted[0]} x {noted[1]}" if noted else "its annotation"
    raise UnusableError(
        f"its EXIF orientation {picture.orientation} turns it to {upright[0]} x {upright[1]}, and {speaks} "
        "may be of the pixels as stored; store it upright without that tag"
    )


def read_bytes(path: Path) -> bytes:
    """A file's bytes; UnusableError where it cannot be read."""
    try:
        return read_file(path)
    except OSError as error:
        raise UnusableError(f"{path.name}: cannot be read ({error.strerror})") from error


def read_mask(path: Path, width: int, height: int) -> np.ndarray:
    """(height, width) uint8: the values of a mask file; of a palette image the indexes.

    Raises:
        UnusableError: it cannot be read, has colours instead of values, or another size than the image.
    """
    from data_pipeline.decoding import decode_indexes

    try:
        values = decode_indexes(read_bytes(path))
    except SampleError as error:
        raise UnusableError(f"{path.name}: {error}") from error
    if values.shape != (height, width):
        raise UnusableError(f"{path.name}: mask of {values.shape[1]} x {values.shape[0]}, image of {width} x {height}")
    return values


def encode_mask(values: np.ndarray) -> bytes:
    """PNG (8-bit grey) of (H, W) uint8 values."""
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG")
    return file.getvalue()
