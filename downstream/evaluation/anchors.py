"""Codecs of pixels to compare with, all by one protocol: image and quality to real bytes, and bytes to an image.

    jpeg:30  webp:50  avif:40  bmshj2018-hyperprior:3        formats of Pillow, and models of CompressAI's zoo

Rates are given in two ways. `total` counts every byte of a file. `payload` leaves out what is the same in every file of
a format and quality, headers and default tables, as a transmission that agrees on them beforehand would; for a format
of Pillow it is measured as the size of a file that holds one flat colour.
"""

from __future__ import annotations

import functools
import io
from abc import ABC, abstractmethod

import numpy as np
import torch
from compressai.zoo import image_models
from PIL import Image, features

from downstream.compressai_latents import create_latents, load_model
from downstream.errors import TaskError
from pretrain.codec import bitstream

FORMATS: dict[str, dict[str, object]] = {
    "jpeg": {"format": "JPEG", "optimize": True},
    "webp": {"format": "WEBP", "method": 6},
    "avif": {"format": "AVIF", "speed": 4},
}


class Anchor(ABC):
    """A codec of pixels at one quality.

    Attributes:
        name, quality: as the user wrote them, "jpeg:30".
    """

    def __init__(self, name: str, quality: int):
        self.name, self.quality = name, quality

    @abstractmethod
    def encode(self, image: np.ndarray) -> bytes:
        """File of an image (H, W, 3) uint8 RGB."""

    @abstractmethod
    def decode(self, data: bytes) -> np.ndarray:
        """The image (H, W, 3) uint8 RGB of a file."""

    @abstractmethod
    def payload_bytes(self, data: bytes, height: int, width: int) -> int:
        """Bytes of a file of an image of this size, without what every such file has."""


class FormatAnchor(Anchor):
    """A file format of Pillow, quality 0..100."""

    def encode(self, image: np.ndarray) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, quality=self.quality, **FORMATS[self.name])  # type: ignore[arg-type]
        return buffer.getvalue()

    def decode(self, data: bytes) -> np.ndarray:
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(image.convert("RGB"))

    def payload_bytes(self, data: bytes, height: int, width: int) -> int:
        return max(0, len(data) - _flat_bytes(self.name, self.quality, height, width))


class ModelAnchor(Anchor):
    """A model of CompressAI's zoo, on the CPU; its files are streams in the container of docs/bitstream.md.

    Args:
        weights: `zoo`, or a file (`compressai_latents.load_model`).
    """

    def __init__(self, name: str, quality: int, weights: str):
        super().__init__(name, quality)
        self._latents = create_latents(load_model(name, quality, weights), torch.device("cpu"))

    def encode(self, image: np.ndarray) -> bytes:
        return self._latents.encode(torch.from_numpy(image).permute(2, 0, 1))

    def decode(self, data: bytes) -> np.ndarray:
        image = self._latents.decode_image(data)[0].permute(1, 2, 0)
        return image.mul(255).round_().to(torch.uint8).contiguous().numpy()

    def payload_bytes(self, data: bytes, height: int, width: int) -> int:
        return sum(bitstream.describe(data).layers.values())


def check_anchor(text: str) -> tuple[str, int]:
    """Name and quality of "NAME:QUALITY" (TaskError where there is no such codec here)."""
    name, _, quality = text.partition(":")
    if name not in FORMATS and name not in image_models:
        raise TaskError(
            f"anchor={text} is unknown; use one of {', '.join(FORMATS)} or of CompressAI's zoo "
            f"({', '.join(image_models)}) and a quality, for example jpeg:30"
        )
    most = 100 if name in FORMATS else 6 if name.startswith("cheng2020") else 8
    least = 0 if name in FORMATS else 1
    if not (quality.isascii() and quality.isdecimal()) or not least <= int(quality) <= most:
        raise TaskError(f"anchor={text} needs a quality from {least} to {most}, for example {name}:{most // 3 + 1}")
    if name in ("webp", "avif") and not features.check(name):
        raise TaskError(f"anchor={text}: this Pillow was built without {name}; install a Pillow wheel that has it")
    return name, int(quality)


def create_anchor(text: str, weights: str = "zoo") -> Anchor:
    """The codec of "NAME:QUALITY".

    Args:
        weights: of a model of CompressAI's; `zoo` downloads them, else a file.

    Raises:
        TaskError: no such codec or quality, or no such weights.
    """
    name, quality = check_anchor(text)
    return FormatAnchor(name, quality) if name in FORMATS else ModelAnchor(name, quality, weights)


@functools.cache
def _flat_bytes(name: str, quality: int, height: int, width: int) -> int:
    return len(FormatAnchor(name, quality).encode(np.full((height, width, 3), 128, np.uint8)))


def through(anchor: Anchor, images: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Decoded images (N, H, W, 3), file sizes (N,) and those of payloads (N,) of images (N, H, W, 3) uint8."""
    decoded, sizes = np.empty_like(images), np.empty((2, len(images)), np.int64)
    height, width = images.shape[1:3]
    for number, image in enumerate(images):
        data = anchor.encode(image)
        decoded[number] = anchor.decode(data)
        sizes[:, number] = len(data), anchor.payload_bytes(data, height, width)
    return decoded, sizes[0], sizes[1]
