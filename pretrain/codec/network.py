"""The networks of the codec, and what of a pass needs no coder.

image -> head -> f1 -> RE -> f2 -> g_a -> y2 -> [h_a -> z -> h_s -> means, scales] -> y2_hat -> g_s -> f3
"""

from __future__ import annotations

from typing import Any

import torch
from compressai.entropy_models import EntropyBottleneck
from torch import Tensor, nn

from pretrain.codec.backbone import Backbone, pad_to
from pretrain.codec.coder import Z_STRIDE
from pretrain.codec.config import CodecConfig
from pretrain.codec.context import ContextModel
from pretrain.codec.entropy import LatentEntropy, bottleneck_round
from pretrain.codec.gains import LOG_SPREAD, RateGains
from pretrain.codec.hyperprior import HyperAnalysis, HyperSynthesis
from pretrain.codec.redundancy import RedundancyElimination
from pretrain.codec.tiles import MARGIN, in_tiles
from pretrain.codec.transforms import AnalysisTransform, SynthesisTransform
from pretrain.errors import CodecError

ONE_RATE = "rate: this codec has one rate; train one with codec.rate_points and stages.codec.rates for a range of them"


class CodecNetwork(nn.Module):
    """Backbone, redundancy elimination (None without it), compression network, and the models of what is coded."""

    def __init__(self, config: CodecConfig):
        super().__init__()
        self.config = config
        self.backbone = Backbone(config.backbone, config.pretrained)
        channels = self.backbone.channels
        self.redundancy = RedundancyElimination(channels, config) if config.redundancy else None
        self.g_a, self.g_s = AnalysisTransform(channels, config), SynthesisTransform(channels, config)
        self.h_a, self.h_s = HyperAnalysis(config), HyperSynthesis(config)
        self.entropy = LatentEntropy(config.z_channels)
        self.context = None if config.context == "none" else ContextModel(config)
        self.z_gain: RateGains | None = None
        self.y2_gain: RateGains | None = None
        if config.rate_points > 1:
            self.z_gain = RateGains(config.rate_points, config.z_channels)
            self.y2_gain = RateGains(config.rate_points, config.latent_channels, LOG_SPREAD)
        self.to(memory_format=torch.channels_last)  # faster for all of its networks, on CPUs and GPUs

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return self.entropy.z.quantiles.device

    @property
    def factorized_priors(self) -> list[EntropyBottleneck]:
        """The models of y1, where there is RE, and of z."""
        return [*([] if self.redundancy is None else [self.redundancy.entropy_bottleneck]), self.entropy.z]

    def eliminate(self, f1: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """f2 of f1, and the likelihoods of y1; without RE f1 itself, and none."""
        if self.redundancy is None:
            return f1, {}
        f2, likelihoods = self.redundancy(f1)
        return f2, {"y1": likelihoods}

    def analyse(self, images: Tensor, tile: int | None = None) -> tuple[Tensor, Tensor]:
        """y2 (N, latent_channels, H/16, W/16) and z (N, z_channels, H/64, W/64) of normalised images, padded to H, W.

        `tile` bounds memory, as in `FeatureCodec.encode`.
        """
        images = pad_to(images, Z_STRIDE)
        y2 = self._transform(images) if tile is None else in_tiles(self._transform, images, tile, MARGIN)
        return y2, self.h_a(y2)

    def _transform(self, images: Tensor) -> Tensor:
        """y2 of normalised images with sides that are multiples of 64."""
        f1 = self.backbone.head(images)
        if self.redundancy is None or self.redundancy.entropy_bottleneck.training:
            f2, _ = self.eliminate(f1)
        else:  # the same without likelihoods, which no stream needs
            f2 = self.redundancy.decode(
                bottleneck_round(self.redundancy.entropy_bottleneck, self.redundancy.encode(f1))
            )
        return self.g_a(f2)

    def gains(self, rate: Tensor | float | None, count: int) -> tuple[Tensor | None, Tensor | None]:
        """Gains (count, C, 1, 1) of z and of y2 at a rate in 0..1, the best if None; none for a codec of one rate.

        Raises:
            CodecError: a rate for a codec of one rate.
        """
        if self.z_gain is None or self.y2_gain is None:
            if rate is not None:
                raise CodecError(ONE_RATE)
            return None, None
        rates = torch.as_tensor(1.0 if rate is None else rate, dtype=torch.float32, device=self.device).expand(count)
        return self.z_gain(rates), self.y2_gain(rates)

    def compile(self, *arguments: Any, **options: Any) -> None:
        """Compile the networks (`torch.compile`), in place: passes, encoding and decoding then run the compiled ones.

        The part that decides symbols stays as it is, in float64.
        """
        networks = [self.backbone.stem, self.backbone.layer1, self.g_a, self.g_s, self.h_a]
        if self.redundancy is not None:
            networks += [self.redundancy.encoder, self.redundancy.decoder]
        for network in networks:
            network.compile(*arguments, **options)
