"""Gated latents as the input of a network's layer2: the part that is trained in front of it.

    y_hat -> gate -> transform -> F (N, C1, H/4, W/4)

Source: Liu, Sun, Katto 2022, sections 2.2, 2.3 and, in front of a detector, 3.7.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from downstream.compressai_latents import create_latents
from downstream.compressai_models import load_model
from downstream.errors import TaskError
from downstream.gate import Gate, StaticGate, create_gate
from downstream.grouping import in_groups, pad_features
from downstream.latent_config import LatentConfig
from downstream.latents import FeatureLatents, LatentCodec, Received
from downstream.transform import LatentTransform
from pretrain.codec.backbone import HEAD_STRIDE, crop_to
from pretrain.codec.feature_codec import FeatureCodec
from pretrain.codec.transforms import SynthesisTransform


def create_latent_codec(
    options: LatentConfig, codec: FeatureCodec | None, rate: float | None, device: torch.device
) -> LatentCodec:
    """The frozen latents that the options name (CodecError, TaskError: unusable)."""
    if options.latents == "codec":
        assert codec is not None
        return FeatureLatents(codec, device, rate)
    model = load_model(options.latents, options.latents_quality, options.latents_weights, options.latents_metric)
    return create_latents(model, device, options.latents_quality)


def synthesis_of(options: LatentConfig, codec: FeatureCodec | None) -> SynthesisTransform | None:
    """The codec's synthesis transform, where its latents are read."""
    return codec.g_s if codec is not None and options.latents == "codec" else None


def gate_of(options: LatentConfig, channels: int) -> Gate:
    """The gate over a latent of `channels`; that of gate=variance has yet to be told its channels.

    Raises:
        TaskError: more channels than there are.
    """
    chosen: Sequence[int] | None = options.chosen or None
    if options.gate == "variance":
        if options.num_channels > channels:
            raise TaskError(f"num_channels={options.num_channels} must lie in 1..{channels}, the latent's channels")
        chosen = range(options.num_channels)
    assert options.gate is not None
    return create_gate(options.gate, channels, chosen)


class LatentInput(nn.Module):
    """F of latents.

    Args:
        gate: over the latent's channels.
        kind: of the transform.
        out_channels: C1, of F.
        synthesis: the codec's, for the kind of that name.
    """

    def __init__(self, gate: Gate, kind: str, out_channels: int, synthesis: SynthesisTransform | None = None):
        super().__init__()
        self.gate, self.kind = gate, kind
        # What was trained on all channels has inputs for all; a new transform has those of a static gate alone.
        in_channels = gate.channels if kind == "synthesis" else gate.num_inputs
        self.transform = LatentTransform(kind, in_channels, out_channels, synthesis=synthesis)

    def forward(self, y_hat: Tensor, height: int, width: int) -> Tensor:
        """F (N, C1, ceil(height/4), ceil(width/4)) of images' y_hat (N, C, h, w), all channels.

        Args:
            height, width: of the images, pixels.
        """
        return crop_to(self.transform(self.gate(y_hat), self._listed), height, width, HEAD_STRIDE)

    def of_many(self, y_hats: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
        """F (C1, ceil(height/4), ceil(width/4)) of latents (C, h, w) of images of any sizes."""
        if self.kind == "synthesis":  # it has a filter that reaches over all of a picture, and would reach its padding
            return in_groups(
                list(zip(y_hats, sizes, strict=True)),
                lambda item: item[1],
                lambda group: list(self(torch.stack([y_hat for y_hat, _ in group]), *group[0][1])),
            )
        # Batch norms want the batch as one. Each image's own gate decides before the padding, which it would take for
        # content.
        features = self.transform(pad_features([self.gate(y_hat[None])[0] for y_hat in y_hats]))
        return [crop_to(one, *size, HEAD_STRIDE) for one, size in zip(features, sizes, strict=True)]

    @property
    def _listed(self) -> Sequence[int] | None:
        """The channels that a static gate passes on, for a transform with inputs for all."""
        return self.gate.choice if self.kind == "synthesis" and isinstance(self.gate, StaticGate) else None

    def from_base(self, received: Received) -> Tensor:
        """F (1, C1, ...) of what a stream's base gave; only its channels are computed with.

        A stream without a list of channels carries all of them; the gate then takes its own.

        Raises:
            TaskError: a stream of other channels than a static gate's.
        """
        if received.channels is None:
            return self(received.latents, received.height, received.width)
        channels: Sequence[int] | None = received.channels
        if isinstance(self.gate, StaticGate):
            if list(received.channels) != self.gate.choice:
                raise TaskError(
                    f"stream carries {_shown(received.channels)}, this network reads {_shown(self.gate.choice)}; "
                    "encode with the channels that it was trained on"
                )
            channels = self._listed
        features = self.transform(received.latents, channels)
        return crop_to(features, received.height, received.width, HEAD_STRIDE)


def feature_distance(features: Tensor, target: Tensor) -> Tensor:
    """MSE(F, F_gt), float32 (Liu, equation 2)."""
    return F.mse_loss(features.float(), target.float())


def _shown(channels: Sequence[int]) -> str:
    first = ", ".join(map(str, channels[:8]))
    return f"{len(channels)} channels ({first}{', ...' if len(channels) > 8 else ''})"
