"""The frozen codec, as tasks see it: images or bitstreams in, features and the bits spent out.

Nothing of it changes: no gradients, no batch statistics, no entropy tables. It is not a submodule of what is
trained, so it is in no optimizer, no checkpoint and no DDP broadcast.
"""

from __future__ import annotations

import torch
from torch import Tensor

from data_pipeline.views import normalize
from downstream.evaluation.anchors import Anchor, through
from pretrain.codec.feature_codec import FeatureCodec


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
