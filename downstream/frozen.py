"""The frozen codec, as tasks see it: images or bitstreams in, features and the bits spent out.

Nothing of it changes: no gradients, no batch statistics, no entropy tables. It is not a submodule of what is
trained, so it is in no optimizer, no checkpoint and no DDP broadcast.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cluster.runtime import Runtime
from data_pipeline.views import normalize
from downstream.errors import TaskError
from downstream.evaluation.anchors import Anchor, create_anchor, through
from downstream.grouping import in_groups
from pretrain.codec.feature_codec import FeatureCodec


class FeatureSource(Protocol):
    """Images to features (N, C, h, w), and the bytes that this takes."""

    def features(self, images: Tensor) -> Tensor:
        """Features of images (N, 3, H, W) uint8, for training: what a stream would give, without making it."""

    def through_streams(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features from real streams or files, bytes (N,) of these, and bytes (N,) of their payloads alone."""

    def encode(self, image: Tensor) -> bytes:
        """The stream or file of an image (3, H, W) uint8."""

    def decode(self, stream: bytes) -> tuple[Tensor, int, int]:
        """Features (1, C, h, w) of what `encode` wrote, and height and width of its image."""

    def decode_all(self, streams: Sequence[bytes]) -> list[Tensor]:
        """Features (C, h, w) of streams of images of any sizes."""


def source_of(
    codec: FeatureCodec,
    input: str,
    anchor: str | None,
    rate: float | None,
    device: torch.device,
    anchor_weights: str = "zoo",
) -> FeatureSource:
    """The source that the options `input`, `anchor`, `anchor_weights` and `rate` name."""
    if input == "streams":
        return FrozenCodec(codec, device, rate)
    return pixel_input(codec.backbone.to(device).eval().requires_grad_(False).head, anchor, anchor_weights, device)


def pixel_input(head: Callable[[Tensor], Tensor], anchor: str | None, weights: str, device: torch.device) -> PixelInput:
    """Pixels by way of the anchor that the options `anchor` and `anchor_weights` name, if any."""
    return PixelInput(head, create_anchor(anchor, weights) if anchor else None, device)


def features_of(source: FeatureSource, images: Sequence[Tensor]) -> list[Tensor]:
    """Features (C, h, w) of images (3, H, W) uint8 of any sizes, those of one size in one pass."""
    return in_groups(images, lambda image: tuple(image.shape), lambda group: list(source.features(torch.stack(group))))


class RateMeter:
    """Adds up bytes and pixels; rates are over all pixels of all images together."""

    def __init__(self) -> None:
        self.sums = torch.zeros(5, dtype=torch.float64)  # bytes, those of payloads, pixels, images, channels

    def add(self, sizes: Tensor, payloads: Tensor, height: int, width: int) -> None:
        """Count images of height x width pixels, whose files have `sizes` (N,) bytes."""
        count = len(sizes)
        added = [sizes.sum(), payloads.sum(), count * height * width, count, 0]
        self.sums += torch.tensor(added, dtype=torch.float64)

    def add_one(self, size: int, payload: int, height: int, width: int, channels: int) -> None:
        """Count an image whose stream has `size` bytes and carries so many channels of a latent."""
        self.sums += torch.tensor([size, payload, height * width, 1, channels], dtype=torch.float64)

    def rates(self, runtime: Runtime) -> dict[str, float]:
        """`bpp`, `bpp_payload`, `images` and, of latents, mean `channels`, over all ranks (TaskError: no image)."""
        sums = runtime.gather(self.sums[None].to(runtime.device)).sum(0).tolist()
        num_bytes, num_payload, pixels, images, channels = sums
        if not images:
            raise TaskError("no image of the validation split can be used; quarantine.jsonl in the run folder says why")
        rates = {"bpp": 8 * num_bytes / pixels, "bpp_payload": 8 * num_payload / pixels, "images": int(images)}
        return {**rates, "channels": channels / images} if channels else rates


class FrozenCodec:
    """Features of images by way of `codec`'s quantized latents, or by way of its real streams.

    Args:
        codec: in eval mode, as `FeatureCodec.from_pretrained` gives it.
        device: where its networks run.
        rate: 0..1, of a codec with a range of rates; None is its best.
    """

    def __init__(self, codec: FeatureCodec, device: torch.device, rate: float | None = None):
        self.codec, self.device, self.rate = codec.to(device).eval().requires_grad_(False), device, rate

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """f3 (N, C1, S/4, S/4) of images (N, 3, S, S) uint8: what a stream would give, without making it.

        In float32 under any autocast: in bf16 a share of the latents would round to the neighbouring symbol.
        """
        with torch.autocast(self.device.type, enabled=False):
            return self.codec.features(normalize(images.to(self.device).float().div(255)), self.rate)

    def through_streams(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """f3 decoded from real streams, bytes (N,) of these, and bytes (N,) of their payloads alone."""
        streams = self.codec.encode_batch(images.to(self.device), self.rate)
        payloads = [sum(self.codec.describe(stream).layers.values()) for stream in streams]
        return self.codec.decode_batch(streams), torch.tensor([len(s) for s in streams]), torch.tensor(payloads)

    def encode(self, image: Tensor) -> bytes:
        """The stream of an image (3, H, W) uint8."""
        return self.codec.encode(image.to(self.device), self.rate)

    def decode(self, stream: bytes) -> tuple[Tensor, int, int]:
        """f3 (1, C1, h, w) of a stream, and height and width of its image (BitstreamError)."""
        info = self.codec.describe(stream)
        return self.codec.decode(stream), info.height, info.width

    def decode_all(self, streams: Sequence[bytes]) -> list[Tensor]:
        """f3 (C1, h, w) of streams, those of images of one size in one pass (BitstreamError)."""

        def size(stream: bytes) -> tuple[int, int]:
            info = self.codec.describe(stream)
            return info.height, info.width

        with torch.autocast(self.device.type, enabled=False):
            return in_groups(streams, size, lambda group: list(self.codec.decode_batch(group)))


class PixelInput:
    """What a network reads of pixels that went through an anchor: the other side of a comparison.

    Args:
        head: of normalised images (N, 3, H, W); the backbone's, or nothing but an identity.
        anchor: codec of pixels; None leaves the pixels as they are.
    """

    def __init__(self, head: Callable[[Tensor], Tensor], anchor: Anchor | None, device: torch.device):
        self.head, self.anchor, self.device = head, anchor, device

    def features(self, images: Tensor) -> Tensor:
        """Features of images (N, 3, H, W) uint8, coded and decoded."""
        return self.through_streams(images)[0]

    def through_streams(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features, bytes (N,) of the files, and bytes (N,) without what is the same in every file."""
        height, width = images.shape[-2:]
        if self.anchor is None:
            sizes = torch.full((len(images),), height * width * 3)
            return self._read(images), sizes, sizes
        pixels, totals, payloads = through(self.anchor, images.permute(0, 2, 3, 1).cpu().contiguous().numpy())
        return self._read(_images(pixels)), torch.from_numpy(totals), torch.from_numpy(payloads)

    def encode(self, image: Tensor) -> bytes:
        """The file of an image (3, H, W) uint8; PNG where there is no anchor."""
        pixels = image.permute(1, 2, 0).cpu().contiguous().numpy()
        if self.anchor is not None:
            return self.anchor.encode(pixels)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        return file.getvalue()

    def decode(self, stream: bytes) -> tuple[Tensor, int, int]:
        """Features (1, C, h, w) of what `encode` wrote, and height and width of its image."""
        pixels = self._pixels(stream)
        return self._read(_images(pixels[None])), pixels.shape[0], pixels.shape[1]

    def decode_all(self, streams: Sequence[bytes]) -> list[Tensor]:
        """Features (C, h, w) of files of images of any sizes."""
        images = [self._pixels(stream) for stream in streams]
        return in_groups(images, lambda image: image.shape, lambda group: list(self._read(_images(np.stack(group)))))

    def decode_pixels(self, stream: bytes) -> Tensor:
        """The image (3, H, W) uint8 of what `encode` wrote."""
        return _images(self._pixels(stream)[None])[0]

    def _pixels(self, stream: bytes) -> np.ndarray:
        if self.anchor is not None:
            return self.anchor.decode(stream)
        with Image.open(io.BytesIO(stream)) as image:
            return np.asarray(image)

    @torch.no_grad()
    def _read(self, images: Tensor) -> Tensor:
        """Features of images (N, 3, H, W) uint8 that were decoded, in float32."""
        with torch.autocast(self.device.type, enabled=False):
            return self.head(normalize(images.to(self.device).float().div(255)))


def _images(pixels: np.ndarray) -> Tensor:
    return torch.tensor(pixels).permute(0, 3, 1, 2)
