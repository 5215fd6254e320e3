"""The frozen codec, as tasks see it: images or bitstreams in, features and the bits spent out.

Nothing of it changes: no gradients, no batch statistics, no entropy tables. It is not a submodule of what is
trained, so it is in no optimizer, no checkpoint and no DDP broadcast.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from cluster.runtime import Runtime
from data_pipeline.views import normalize
from downstream.errors import TaskError
from downstream.evaluation.anchors import Anchor, through
from pretrain.codec.feature_codec import FeatureCodec


class FeatureSource(Protocol):
    """Images to features (N, C1, H/4, W/4), and the bytes that this takes."""

    def features(self, images: Tensor) -> Tensor:
        """Features of images (N, 3, H, W) uint8, for training: what a stream would give, without making it."""

    def through_streams(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features from real streams or files, bytes (N,) of these, and bytes (N,) of their payloads alone."""

    def decode(self, stream: bytes) -> tuple[Tensor, int, int]:
        """Features (1, C1, h, w) of a stream, and height and width of its image (TaskError: none are read)."""


def source_of(
    codec: FeatureCodec, input: str, anchor: str | None, rate: float | None, device: torch.device
) -> FeatureSource:
    """The source that the options `input`, `anchor` and `rate` name."""
    if input == "streams":
        return FrozenCodec(codec, device, rate)
    return PixelInput(codec, Anchor.parse(anchor) if anchor else None, device)


def features_of(source: FeatureSource, images: Sequence[Tensor]) -> list[Tensor]:
    """Features (C1, h, w) of images (3, H, W) uint8 of any sizes, those of one size in one pass."""
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for number, image in enumerate(images):
        groups[tuple(image.shape)].append(number)
    found: dict[int, Tensor] = {}
    for numbers in groups.values():
        found.update(zip(numbers, source.features(torch.stack([images[number] for number in numbers])), strict=True))
    return [found[number] for number in range(len(images))]


class RateMeter:
    """Adds up bytes and pixels; rates are over all pixels of all images together."""

    def __init__(self) -> None:
        self.sums = torch.zeros(4, dtype=torch.float64)  # bytes, those of payloads, pixels, images

    def add(self, sizes: Tensor, payloads: Tensor, height: int, width: int) -> None:
        """Count images of height x width pixels, whose files have `sizes` (N,) bytes."""
        count = len(sizes)
        added = [sizes.sum(), payloads.sum(), count * height * width, count]
        self.sums += torch.tensor(added, dtype=torch.float64)

    def rates(self, runtime: Runtime) -> dict[str, float]:
        """`bpp`, `bpp_payload` and `images`, over all ranks."""
        sums = runtime.gather(self.sums[None].to(runtime.device)).sum(0).tolist()
        num_bytes, num_payload, pixels, images = sums
        return {"bpp": 8 * num_bytes / pixels, "bpp_payload": 8 * num_payload / pixels, "images": int(images)}


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

    def decode(self, stream: bytes) -> tuple[Tensor, int, int]:
        """f3 (1, C1, h, w) of a stream, and height and width of its image (BitstreamError)."""
        info = self.codec.describe(stream)
        return self.codec.decode(stream), info.height, info.width


class PixelInput:
    """f1 of pixels that went through an anchor, the head of the same backbone: the other side of a comparison.

    Args:
        anchor: codec of pixels; None leaves the pixels as they are.
    """

    def __init__(self, codec: FeatureCodec, anchor: Anchor | None, device: torch.device):
        self.backbone, self.anchor, self.device = codec.backbone.to(device).eval(), anchor, device
        self.backbone.requires_grad_(False)

    def features(self, images: Tensor) -> Tensor:
        """f1 (N, C1, S/4, S/4) of images (N, 3, S, S) uint8, coded and decoded."""
        return self.through_streams(images)[0]

    @torch.no_grad()
    def through_streams(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """f1, bytes (N,) of the files, and bytes (N,) without what is the same in every file."""
        height, width = images.shape[-2:]
        if self.anchor is None:
            sizes = torch.full((len(images),), height * width * 3)
            return self.backbone.head(normalize(images.to(self.device).float().div(255))), sizes, sizes
        pixels, file_sizes = through(self.anchor, images.permute(0, 2, 3, 1).cpu().contiguous().numpy())
        sizes = torch.from_numpy(file_sizes)
        payloads = (sizes - self.anchor.header_bytes(height, width)).clamp(min=0)
        decoded = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(self.device)
        return self.backbone.head(normalize(decoded.float().div(255))), sizes, payloads

    def decode(self, stream: bytes) -> tuple[Tensor, int, int]:
        """Refuse: pixels come as images."""
        raise TaskError("this run reads pixels (input=pixels), not streams; give it images")
