"""Gated latents as the input of a network's layer2: options, and the part that is trained in front of it.

    y_hat -> gate -> transform -> F (N, C1, H/4, W/4)

Source: Liu, Sun, Katto 2022, sections 2.2, 2.3 and, in front of a detector, 3.7.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from downstream.compressai_latents import create_latents, load_model
from downstream.errors import TaskError
from downstream.frozen import feature_size
from downstream.gate import GATES, Gate, StaticGate, create_gate
from downstream.latents import FeatureLatents, LatentCodec, Received
from downstream.transform import TRANSFORMS, LatentTransform
from pretrain.codec.feature_codec import FeatureCodec
from pretrain.coding import read_channels


@dataclass
class LatentOptions:
    """Which latents are read, and how; a task's config takes these in."""

    latents: str = "codec"  # y2 of the codec; or a model of CompressAI's zoo: bmshj2018-hyperprior is the paper's
    latents_quality: int = 4  # of a zoo model's weights
    latents_metric: str = "mse"
    latents_weights: str = "zoo"  # or a file

    gate: str | None = None  # dynamic, static, variance or none
    num_channels: int = 32  # gate=variance: how many are kept
    channels: str | None = None  # gate=static: file that `dicm select-channels` wrote
    chosen: list[int] = field(default_factory=list)  # what that file says
    transform: str = "deconv"
    feature_weight: float = 1.0  # of MSE(F, F_gt)

    def validate_latents(self, codec: str | None) -> None:
        """Refuse what cannot work (TaskError)."""
        if self.gate is not None and self.gate not in GATES:
            raise TaskError(f"gate={self.gate} is unknown; use one of {', '.join(GATES)}")
        if self.transform not in TRANSFORMS:
            raise TaskError(f"transform={self.transform} is unknown; use one of {', '.join(TRANSFORMS)}")
        if self.latents == "codec" and codec is None:
            raise TaskError("latents=codec needs a codec: codec=DIR; or name a model of CompressAI's: latents=NAME")
        if (self.gate == "static") != (self.channels is not None or bool(self.chosen)):
            given = f"gate={self.gate} channels={self.channels}"
            raise TaskError(f"{given}: gate=static needs the file of `dicm select-channels`, other gates take none")
        if self.num_channels < 1:
            raise TaskError(f"num_channels={self.num_channels} is impossible; it must be at least 1")
        if self.latents != "codec" and getattr(self, "rate", None) is not None:
            raise TaskError(f"rate with latents={self.latents} is impossible; its rate is latents_quality")
        if self.feature_weight < 0:
            raise TaskError(f"feature_weight={self.feature_weight:g} is impossible; it must not be negative")

    def read_chosen(self) -> None:
        """Take the channels of gate=static from their file, once (ConfigError: it names none)."""
        if self.channels is None:
            return
        found = read_channels(Path(self.channels))
        if self.chosen and self.chosen != found:
            raise TaskError(f"channels={self.channels} names other channels than chosen={self.chosen[:8]}; give one")
        self.chosen, self.num_channels = found, len(found)


def create_latent_codec(
    options: LatentOptions, codec: FeatureCodec | None, rate: float | None, device: torch.device
) -> LatentCodec:
    """The frozen latents that the options name (CodecError, TaskError: unusable)."""
    if options.latents == "codec":
        assert codec is not None
        return FeatureLatents(codec, device, rate)
    model = load_model(options.latents, options.latents_quality, options.latents_weights, options.latents_metric)
    return create_latents(model, device)


def gate_of(options: LatentOptions, channels: int) -> Gate:
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
    """

    def __init__(self, gate: Gate, kind: str, out_channels: int):
        super().__init__()
        self.gate = gate
        self.transform = LatentTransform(kind, gate.num_inputs, out_channels)

    def forward(self, y_hat: Tensor, height: int, width: int) -> Tensor:
        """F (N, C1, ceil(height/4), ceil(width/4)) of images' y_hat (N, C, h, w), all channels.

        Args:
            height, width: of the images, pixels.
        """
        return cut(self.transform(self.gate(y_hat)), height, width)

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
            channels = None  # its transform has no other inputs than these
        features = self.transform(received.latents, channels)
        return cut(features, received.height, received.width)


def cut(features: Tensor, height: int, width: int) -> Tensor:
    """Features (..., h, w) without what belongs to the padding of an image of height x width pixels."""
    rows, columns = feature_size(height, width)
    return features[..., :rows, :columns]


def feature_distance(features: Tensor, target: Tensor) -> Tensor:
    """MSE(F, F_gt), float32 (Liu, equation 2)."""
    return F.mse_loss(features.float(), target.float())


def _shown(channels: Sequence[int]) -> str:
    first = ", ".join(map(str, channels[:8]))
    return f"{len(channels)} channels ({first}{', ...' if len(channels) > 8 else ''})"
