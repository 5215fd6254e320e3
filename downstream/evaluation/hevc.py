"""HEVC intra by x265, through PyAV: a still picture as BPG codes it.

Settings are those that `bpgenc` gives x265 by default: compression level 8, which is preset veryslow, tuned for SSIM,
at a constant quantizer, 8 bits, YCbCr of BT.601 in full range. Files are HEVC byte streams with parameter sets.

Sources: libbpg 0.9.8 (Bellard), bpgenc.c and x265_glue.c, for the settings; Rec. ITU-T H.265.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
from PIL import Image

from downstream.errors import TaskError

PRESET, TUNE = "veryslow", "ssim"
MOST_QP = 51
# One thread and no SEI: what is left is the picture and what a decoder needs to read it.
PARAMETERS = "keyint=1:repeat-headers=1:info=0:hash=0:rect=1:amp=1:pools=none:frame-threads=1:wpp=0:log-level=none"
LARGEST_BLOCK, SMALLEST_BLOCK = 64, 16


def need_av() -> Any:
    """PyAV with x265 (TaskError where there is none)."""
    try:
        import av

        av.Codec("libx265", "w")
    except (ImportError, ValueError) as error:
        raise TaskError(f"HEVC needs PyAV with x265 ({error}); install it with pip install 'dicm[anchors]'") from error
    return av


def encode(image: np.ndarray, qp: int, chroma: str) -> bytes:
    """HEVC byte stream of an image (H, W, 3) uint8 RGB.

    Args:
        qp: of x265, 0 (best) .. 51.
        chroma: "420" or "444".
    """
    av = need_av()
    planes = to_planes(image, chroma)
    height, width = planes[0].shape
    block = LARGEST_BLOCK
    while block > SMALLEST_BLOCK and block > min(height, width):  # a picture smaller than a block needs smaller ones
        block //= 2
    encoder = av.CodecContext.create("libx265", "w")
    encoder.width, encoder.height, encoder.pix_fmt = width, height, f"yuv{chroma}p"
    encoder.time_base = Fraction(1, 25)
    encoder.options = {"preset": PRESET, "tune": TUNE, "x265-params": f"qp={qp}:ctu={block}:{PARAMETERS}"}
    packets = [*encoder.encode(to_frame(av, planes, chroma)), *encoder.encode(None)]
    return b"".join(bytes(packet) for packet in packets)


def decode(data: bytes, height: int, width: int, codec: str = "hevc") -> np.ndarray:
    """The image (height, width, 3) uint8 RGB of what `encode` wrote.

    Args:
        codec: FFmpeg's decoder.

    Raises:
        TaskError: not such a stream.
    """
    av = need_av()
    decoder = av.CodecContext.create(codec, "r")
    try:
        frames = [*decoder.decode(av.Packet(data)), *decoder.decode(None)]
    except av.FFmpegError as error:
        raise TaskError(f"stream is no {codec} picture ({error}); encode the image again") from error
    if not frames:
        raise TaskError(f"stream holds no {codec} picture; encode the image again")
    return from_planes(_planes_of(frames[0]), height, width)


def to_planes(image: np.ndarray, chroma: str) -> list[np.ndarray]:
    """Y, Cb and Cr of an image (H, W, 3) uint8 RGB, sides made even; of 420, Cb and Cr are means of four pixels."""
    height, width = image.shape[:2]
    even = np.pad(image, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    bands = list(Image.fromarray(even).convert("YCbCr").split())
    if chroma == "420":
        bands[1:] = [band.reduce(2) for band in bands[1:]]
    return [np.asarray(band) for band in bands]


def from_planes(planes: list[np.ndarray], height: int, width: int) -> np.ndarray:
    """The image (height, width, 3) uint8 RGB of Y, Cb and Cr (uint8)."""
    bands = [Image.fromarray(np.ascontiguousarray(plane)) for plane in planes]
    full = [bands[0], *(band.resize(bands[0].size, Image.Resampling.BICUBIC) for band in bands[1:])]
    return np.asarray(Image.merge("YCbCr", full).convert("RGB"))[:height, :width]


def to_frame(av: Any, planes: list[np.ndarray], chroma: str) -> Any:
    """A frame of PyAV's that holds the planes as they are: no conversion of its own takes place."""
    frame = av.VideoFrame(planes[0].shape[1], planes[0].shape[0], f"yuv{chroma}p")
    for plane, values in zip(frame.planes, planes, strict=True):
        rows = np.zeros((plane.height, plane.line_size), np.uint8)
        rows[:, : plane.width] = values
        plane.update(rows)
    return frame


def _planes_of(frame: Any) -> list[np.ndarray]:
    """Y, Cb and Cr (uint8) of a decoded frame of 8 or 10 bits."""
    depth = 10 if "10" in frame.format.name else 8
    found = []
    for plane in frame.planes:
        kind = np.dtype("<u2" if depth == 10 else "u1")
        rows = np.frombuffer(plane, kind).reshape(plane.height, plane.line_size // kind.itemsize)[:, : plane.width]
        found.append(rows if depth == 8 else ((rows + 2) >> 2).clip(0, 255).astype(np.uint8))
    return found
