"""Codecs of pixels to compare with, all by one protocol: image and quality to real bytes, and bytes to an image.

    jpeg:30  webp:50  avif:40          formats of Pillow, quality 0..100
    hevc:37  hevc444:37                HEVC intra by x265, at a quantizer of 0..51 (`hevc.py`)
    bpg:37  vvc:37  vtm:37             programs on PATH (`programs.py`)
    mbt2018-mean:3  elic2022-official:3     models of CompressAI, weights of its zoo or trained here
    hevc:42@0.5                        any of them on an image of half the sides, enlarged again after decoding

Rates are given in two ways. `total` counts every byte of a file. `payload` leaves out what is the same in every file of
a format and quality, headers and default tables, as a transmission that agrees on them beforehand would; it is measured
as the size of a file that holds one flat colour, so that an anchor's smallest possible file counts nothing.
"""

from __future__ import annotations

import functools
import io
import math
import struct
from abc import ABC, abstractmethod
from collections.abc import Container
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, features

from cluster.machine import num_cpus
from downstream.compressai_latents import create_latents
from downstream.compressai_models import MODELS, load_model, most_quality
from downstream.errors import TaskError
from downstream.evaluation import hevc, programs

FORMATS: dict[str, dict[str, object]] = {
    "jpeg": {"format": "JPEG", "optimize": True},
    "webp": {"format": "WEBP", "method": 6},
    "avif": {"format": "AVIF", "speed": 4},
}
CHROMA = {"hevc": "420", "hevc444": "444"}
_FILES = (*FORMATS, *CHROMA, *programs.PROGRAMS)
SIZE = struct.Struct("<HH")  # of the image, before the file of one that was shrunk
LEAST_SIDE = 16  # pixels, of an image that is shrunk


class AnchorSpec(NamedTuple):
    """An anchor as a user names it: "hevc:42@0.5"."""

    name: str
    quality: int
    scale: float

    def __str__(self) -> str:
        return f"{self.name}:{self.quality}" + (f"@{self.scale:g}" if self.scale != 1 else "")


class Anchor(ABC):
    """A codec of pixels at one quality.

    Attributes:
        spec: as the user wrote it.
    """

    def __init__(self, spec: AnchorSpec):
        self.spec = spec

    @abstractmethod
    def encode(self, image: np.ndarray) -> bytes:
        """File of an image (H, W, 3) uint8 RGB."""

    @abstractmethod
    def decode(self, data: bytes) -> np.ndarray:
        """The image (H, W, 3) uint8 RGB of a file."""

    def payload_bytes(self, data: bytes, height: int, width: int) -> int:
        """Bytes of a file of an image of this size, without what every such file has."""
        return max(0, len(data) - _flat_bytes(self.spec, height, width))


class FormatAnchor(Anchor):
    """A file format of Pillow, quality 0..100."""

    def encode(self, image: np.ndarray) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, quality=self.spec.quality, **FORMATS[self.spec.name])  # type: ignore[arg-type]
        return buffer.getvalue()

    def decode(self, data: bytes) -> np.ndarray:
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(image.convert("RGB"))


class HevcAnchor(Anchor):
    """HEVC intra; the size of the image goes before its stream, which carries an even one."""

    def encode(self, image: np.ndarray) -> bytes:
        return _sized(image, hevc.encode(image, self.spec.quality, CHROMA[self.spec.name]))

    def decode(self, data: bytes) -> np.ndarray:
        height, width, stream = _unsized(data)
        return hevc.decode(stream, height, width)


class ProgramAnchor(Anchor):
    """A program on PATH."""

    def encode(self, image: np.ndarray) -> bytes:
        return _sized(image, programs.encode(self.spec.name, image, self.spec.quality))

    def decode(self, data: bytes) -> np.ndarray:
        height, width, stream = _unsized(data)
        return programs.decode(self.spec.name, stream, height, width)


class ModelAnchor(Anchor):
    """A model of CompressAI, on the CPU; its files are streams in the container of docs/bitstream.md.

    Args:
        weights: `zoo`, or a file (`compressai_models.load_model`).
    """

    def __init__(self, spec: AnchorSpec, weights: str):
        super().__init__(spec)
        model = load_model(spec.name, spec.quality, weights)
        self._latents = create_latents(model, torch.device("cpu"), spec.quality)

    def encode(self, image: np.ndarray) -> bytes:
        return self._latents.encode(torch.from_numpy(image).permute(2, 0, 1))

    def decode(self, data: bytes) -> np.ndarray:
        image = self._latents.decode_image(data)[0].permute(1, 2, 0)
        return image.mul(255).round_().to(torch.uint8).contiguous().numpy()

    def payload_bytes(self, data: bytes, height: int, width: int) -> int:
        return self._latents.payload_bytes(data)


class ShrunkAnchor(Anchor):
    """An anchor on a smaller image, enlarged after decoding: what reaches rates below those of its worst quality.

    Args:
        inner: the anchor at full size.
    """

    def __init__(self, spec: AnchorSpec, inner: Anchor):
        super().__init__(spec)
        self.inner = inner

    def encode(self, image: np.ndarray) -> bytes:
        height, width = self._size(*image.shape[:2])
        small = Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS)
        return _sized(image, self.inner.encode(np.asarray(small)))

    def decode(self, data: bytes) -> np.ndarray:
        height, width, inner = _unsized(data)
        small = Image.fromarray(self.inner.decode(inner))
        return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))

    def payload_bytes(self, data: bytes, height: int, width: int) -> int:
        return self.inner.payload_bytes(_unsized(data)[2], *self._size(height, width))

    def _size(self, height: int, width: int) -> tuple[int, int]:
        return tuple(max(LEAST_SIDE, math.ceil(side * self.spec.scale)) for side in (height, width))  # type: ignore[return-value]


def is_anchor(name: str) -> bool:
    """Whether a codec of pixels is called so."""
    return name in _FILES or name in MODELS


def check_anchor(text: str) -> AnchorSpec:
    """What "NAME:QUALITY" or "NAME:QUALITY@SCALE" says (TaskError where there is no such codec here)."""
    head, _, scale = text.partition("@")
    name, _, quality = head.partition(":")
    if not is_anchor(name):
        raise TaskError(
            f"anchor={text} is unknown; use one of {', '.join(_FILES)} or of CompressAI's models ({', '.join(MODELS)}) "
            "and a quality, for example jpeg:30"
        )
    least, most = quality_range(name)
    if not (quality.isascii() and quality.isdecimal()) or not least <= int(quality) <= most:
        raise TaskError(f"anchor={text} needs a quality from {least} to {most}, for example {name}:{most // 3 + 1}")
    if "@" in text and not _is_scale(scale):
        raise TaskError(f"anchor={text} needs a scale of at most 1 behind @, from 0.1, for example {head}@0.5")
    if name in ("webp", "avif") and not features.check(name):
        raise TaskError(f"anchor={text}: this Pillow was built without {name}; install a Pillow wheel that has it")
    if name in CHROMA:
        hevc.need_av()
    if name in programs.PROGRAMS:
        programs.need(name)
    return AnchorSpec(name, int(quality), float(scale or 1))


def quality_range(name: str) -> tuple[int, int]:
    """Least and greatest quality of an anchor, as numbers: the greatest is the best of Pillow's and the models'."""
    if name in FORMATS:
        return 0, 100
    if name in CHROMA:
        return 0, hevc.MOST_QP
    return (0, programs.MOST_QP[name]) if name in programs.PROGRAMS else (1, most_quality(name))


def create_anchor(text: str, weights: str = "zoo") -> Anchor:
    """The codec of "NAME:QUALITY" or "NAME:QUALITY@SCALE".

    Args:
        weights: of a model of CompressAI's; `zoo` downloads them, else a file.

    Raises:
        TaskError: no such codec or quality, or no such weights.
    """
    spec = check_anchor(text)
    if spec.scale != 1:
        return ShrunkAnchor(spec, create_anchor(f"{spec.name}:{spec.quality}", weights))
    if spec.name in MODELS:
        return ModelAnchor(spec, weights)
    return next(kind for names, kind in _KINDS if spec.name in names)(spec)


_KINDS: list[tuple[Container[str], type[Anchor]]] = [
    (FORMATS, FormatAnchor),
    (CHROMA, HevcAnchor),
    (programs.PROGRAMS, ProgramAnchor),
]


@functools.cache
def _flat_bytes(spec: AnchorSpec, height: int, width: int) -> int:
    return len(create_anchor(str(spec)).encode(np.full((height, width, 3), 128, np.uint8)))


def through(anchor: Anchor, images: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Decoded images (N, H, W, 3), file sizes (N,) and those of payloads (N,) of images (N, H, W, 3) uint8."""
    height, width = images.shape[1:3]

    def code(image: np.ndarray) -> tuple[np.ndarray, int, int]:
        data = anchor.encode(image)
        return anchor.decode(data), len(data), anchor.payload_bytes(data, height, width)

    # AVIF takes 20 ms for an image of 64 px, outside of Python's lock; x265 and models gain nothing from threads.
    with ThreadPoolExecutor(num_cpus() if isinstance(anchor, FormatAnchor) else 1) as pool:
        decoded, totals, payloads = zip(*pool.map(code, images), strict=True)
    return np.stack(decoded), np.array(totals), np.array(payloads)


def _sized(image: np.ndarray, stream: bytes) -> bytes:
    return SIZE.pack(*image.shape[:2]) + stream


def _unsized(data: bytes) -> tuple[int, int, bytes]:
    height, width = SIZE.unpack_from(data)
    return height, width, data[SIZE.size :]


def _is_scale(text: str) -> bool:
    try:
        return 0.1 <= float(text) <= 1
    except ValueError:
        return False
