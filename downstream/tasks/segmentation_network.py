"""The student of semantic segmentation: DeepLabv3 on gated latents, without stem and layer1; and its loss.

    y_hat -> gate -> transform -> F -> layer2..4 -> ASPP -> logits

Source: Liu, Sun, Katto 2022, sections 2 and 3.1.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from data_pipeline.masks import IGNORE
from downstream.gate import Gate
from downstream.latents import Received
from downstream.tasks.deeplab import DeepLab, SegmentationTail, enlarge
from downstream.tasks.latent_input import LatentInput
from pretrain.codec.transforms import SynthesisTransform


class SegmentationNetwork(nn.Module):
    """The student: logits of latents.

    Args:
        gate: over the latent's channels.
        kind: of the transform.
        deeplab: whose tail, behind F, becomes the student's.
        synthesis: the codec's, as of `LatentInput`.
    """

    def __init__(self, gate: Gate, kind: str, deeplab: DeepLab, synthesis: SynthesisTransform | None = None):
        super().__init__()
        self.input = LatentInput(gate, kind, deeplab.channels, synthesis)
        self.tail: SegmentationTail = deeplab.tail

    def forward(self, y_hat: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Logits (N, num_classes, height, width) and F (N, C1, ceil(height/4), ceil(width/4)) of images' y_hat."""
        features = self.input(y_hat, height, width)
        return self.read(features, height, width), features

    def from_base(self, received: Received) -> Tensor:
        """Logits (1, num_classes, height, width) of what a stream's base gave."""
        return self.read(self.input.from_base(received), received.height, received.width)

    def read(self, features: Tensor, height: int, width: int) -> Tensor:
        """Logits of F."""
        return enlarge(self.tail(features).float(), height, width)


def segmentation_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Cross-entropy of logits (N, K, H, W) and masks (N, H, W) int64 over the pixels that count; 0 where none does."""
    losses = F.cross_entropy(logits.float(), masks, ignore_index=IGNORE, reduction="sum")
    return losses / (masks != IGNORE).sum().clamp(min=1)
