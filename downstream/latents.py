"""Quantized latents as tasks see them: images in, y_hat and the streams that carry it out.

What is sent has two layers: `base` with the channels that a task wants, `rest` with the others. A receiver that has the
base runs the task; one that has both has the whole latent. Both kinds of latents, those of the frozen codec and of
CompressAI's models (`compressai_latents`), travel in the container of docs/bitstream.md.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from data_pipeline.views import normalize
from downstream.grouping import in_groups
from pretrain.codec import bitstream
from pretrain.codec.coder import Choice
from pretrain.codec.feature_codec import FeatureCodec
from pretrain.errors import CodecError


class Received(NamedTuple):
    """What a stream's base gives.

    Attributes:
        latents: (1, n, h, w) float32, the channels that it carries of y_hat; h and w are H/16 and W/16 of the image
        padded to multiples of 64. channels: their numbers, ascending; None: all. height, width: of the image.
    """

    latents: Tensor
    channels: tuple[int, ...] | None
    height: int
    width: int


class LatentCodec(ABC):
    """A frozen codec whose latents a task reads.

    Attributes:
        channels: C of y_hat.
        device: where its networks run.
    """

    channels: int
    device: torch.device

    @abstractmethod
    def latents(self, images: Tensor) -> Tensor:
        """y_hat (N, C, h, w) float32 of images (N, 3, H, W) uint8, without making bytes: what streams would carry."""

    @abstractmethod
    def encode(self, image: Tensor, channels: Choice | None = None, rest: bool = False) -> bytes:
        """The stream of an image (3, H, W) uint8.

        Args:
            channels: that `base` holds: their numbers, or a function that names them for y_hat (C, h, w); all if None.
            rest: code the others as a second layer.
        """

    @abstractmethod
    def receive(self, stream: bytes) -> Received:
        """The base of a stream, of which no byte behind it is needed (BitstreamError: damaged, of another codec)."""

    @abstractmethod
    def decode(self, stream: bytes) -> Tensor:
        """y_hat (1, C, h, w) of a stream with both layers (BitstreamError: damaged; CodecError: has no rest)."""

    def decode_all(self, streams: Sequence[bytes]) -> list[Tensor]:
        """y_hat (C, h, w) of streams with all their layers, of images of any sizes (as `decode`)."""
        return [self.decode(stream)[0] for stream in streams]

    def need_channels(self) -> None:
        """CodecError where channels cannot be sent one without the other; that is the exception."""
        return

    def payload_bytes(self, stream: bytes) -> int:
        """Bytes of a stream without its header: its layers."""
        return sum(bitstream.describe(stream).layers.values())

    def split(self, stream: bytes) -> tuple[bytes, bytes]:
        """Base and rest: with chosen channels, the first is what a task needs; in a row they are the stream again."""
        end = bitstream.describe(stream).base_bytes
        return stream[:end], stream[end:]


class FeatureLatents(LatentCodec):
    """y2 of the frozen codec.

    Args:
        codec: in eval mode, as `FeatureCodec.from_pretrained` gives it.
        rate: 0..1, of a codec with a range of rates; None is its best.
    """

    def __init__(self, codec: FeatureCodec, device: torch.device, rate: float | None = None):
        self.codec, self.device, self.rate = codec.to(device).eval().requires_grad_(False), device, rate
        self.channels = codec.config.latent_channels

    def need_channels(self) -> None:
        if self.codec.config.context != "none":
            raise CodecError("a codec with a context model predicts from all channels; gate=none reads them all")

    @torch.no_grad()
    def latents(self, images: Tensor) -> Tensor:
        # In float32 under any autocast: in bf16 a share of the latents would round to the neighbouring symbol.
        with torch.autocast(self.device.type, enabled=False):
            return self.codec.latents(normalize(images.to(self.device).float().div(255)), self.rate)

    def encode(self, image: Tensor, channels: Choice | None = None, rest: bool = False) -> bytes:
        return self.codec.encode(image, self.rate, channels=channels, rest=rest)

    def receive(self, stream: bytes) -> Received:
        info = self.codec.describe(stream)
        if info.channels is None:
            return Received(self.codec.decode_latents([stream]), None, info.height, info.width)
        chosen = info.channels.chosen
        y_hat = self.codec.decode_latents([stream], last_layer="base")
        return Received(y_hat[:, list(chosen)], chosen, info.height, info.width)

    def decode(self, stream: bytes) -> Tensor:
        return self.decode_all([stream])[0][None]

    def decode_all(self, streams: Sequence[bytes]) -> list[Tensor]:
        """Those of images of one size in one pass."""

        def kind(stream: bytes) -> tuple[int, int, bool]:
            info = self.codec.describe(stream)
            return info.height, info.width, info.channels is not None

        def decode(group: list[bytes]) -> list[Tensor]:
            listed = kind(group[0])[-1]
            return list(self.codec.decode_latents(group, last_layer="rest" if listed else None))

        with torch.autocast(self.device.type, enabled=False):
            return in_groups(streams, kind, decode)
