"""Codecs of pixels to compare with, all by one protocol: image and quality to real bytes, and bytes to an image.

Rates are given in two ways. `total` counts every byte of a file. `payload` leaves out what is the same in every file of
a format and quality, headers and default tables, as a transmission that agrees on them beforehand would; it is
measured as the size of a file that holds one flat colour.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, features

from downstream.errors import TaskError

FORMATS: dict[str, dict[str, object]] = {
    "jpeg": {"format": "JPEG", "optimize": True},
    "webp": {"format": "WEBP", "method": 6},
    "avif": {"format": "AVIF", "speed": 4},
}


@dataclass(frozen=True)
class Anchor:
    """A codec of pixels at one quality.

    Attributes:
        name, quality: as the user wrote them, "jpeg:30".
    """

    name: str
    quality: int

    @classmethod
    def parse(cls, text: str) -> Anchor:
        """Anchor of "FORMAT:QUALITY", quality 0..100 (TaskError)."""
        name, _, quality = text.partition(":")
        if name not in FORMATS:
            raise TaskError(
                f"anchor={text} is unknown; use one of {', '.join(FORMATS)} and a quality, for example jpeg:30"
            )
        if not quality.isdigit() or not 0 <= int(quality) <= 100:
            raise TaskError(f"anchor={text} needs a quality from 0 to 100, for example {name}:30")
        if name != "jpeg" and not features.check(name):
            raise TaskError(f"anchor={text}: this Pillow was built without {name}; install a Pillow wheel that has it")
        return cls(name, int(quality))

    def encode(self, image: np.ndarray) -> bytes:
        """File of an image (H, W, 3) uint8 RGB."""
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, quality=self.quality, **FORMATS[self.name])  # type: ignore[arg-type]
        return buffer.getvalue()

    @staticmethod
    def decode(data: bytes) -> np.ndarray:
        """The image (H, W, 3) uint8 RGB of a file."""
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(image.convert("RGB"))

    def header_bytes(self, height: int, width: int) -> int:
        """Bytes of a file of this size that holds one flat colour: what every file pays."""
        return _flat_bytes(self, height, width)


@functools.cache
def _flat_bytes(anchor: Anchor, height: int, width: int) -> int:
    return len(anchor.encode(np.full((height, width, 3), 128, np.uint8)))


def through(
    anchor: Anchor, images: np.ndarray, on_image: Callable[[], None] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Decoded images (N, H, W, 3) and file sizes (N,) of images (N, H, W, 3) uint8."""
    decoded, sizes = np.empty_like(images), np.empty(len(images), np.int64)
    for number, image in enumerate(images):
        data = anchor.encode(image)
        decoded[number], sizes[number] = anchor.decode(data), len(data)
        if on_image is not None:
            on_image()
    return decoded, sizes
