"""The network that self-supervised learning trains: backbone, with or without RE in its middle.

    images (N, 3, H, W) -> head -> f1 -> [RE -> f2] -> tail -> layer4 -> mean over places -> features (N, D)

H and W are multiples of 32. Source: DICM (Tang, Yi, Wang 2025), "semantic-guided SSL" and the joint stage.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from pretrain.codec.backbone import Backbone
from pretrain.codec.redundancy import RedundancyElimination
from pretrain.errors import CodecError
from pretrain.ssl.config import LAYERS, nearest


class EncoderOutput(NamedTuple):
    """Pooled layer4 (N, D); f1 and f2 (N, C1, H/4, W/4); f2 and y1's likelihoods are None without RE."""

    features: Tensor
    f1: Tensor
    f2: Tensor | None
    y1_likelihoods: Tensor | None


class Encoder(nn.Module):
    """Backbone and RE, both registered all the time; `redundancy_enabled` puts RE into the path.

    A flag rather than two networks, so that the names in the state dict are the same before and after.
    """

    def __init__(self, backbone: Backbone, redundancy: RedundancyElimination | None = None):
        super().__init__()
        self.backbone = backbone
        self.redundancy = redundancy
        self.redundancy_enabled = False

    def forward(self, images: Tensor) -> EncoderOutput:
        """Features of normalised images (N, 3, H, W)."""
        f1, f2, likelihoods = self._head(images)
        layer4 = self.backbone.tail(f1 if f2 is None else f2)[-1]
        return EncoderOutput(self.backbone.pool(layer4), f1, f2, likelihoods)

    def feature_map(self, images: Tensor, layer: str) -> Tensor:
        """Output (N, C, H/s, W/s) of `layer` on the path of `forward`; nothing after it is computed.

        layer1 is f1, or f2 with RE.

        Raises:
            CodecError: `layer` is not one of layer1, layer2, layer3, layer4.
        """
        if layer not in LAYERS:
            raise CodecError(f"layer {layer} is unknown; use {nearest(layer, LAYERS)}")
        f1, f2, _ = self._head(images)
        features = f1 if f2 is None else f2
        for name in LAYERS[1 : LAYERS.index(layer) + 1]:
            features = getattr(self.backbone, name)(features)
        return features

    def _head(self, images: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        f1 = self.backbone.head(images)
        if not self.redundancy_enabled:
            return f1, None, None
        assert self.redundancy is not None
        f2, likelihoods = self.redundancy(f1)
        return f1, f2, likelihoods
