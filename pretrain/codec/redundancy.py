"""RE, redundancy elimination: what of f1 the contrastive loss does not need is not paid for.

      f1 (C1, H/4) -> 1x1 -> [blocks, 3x3 /2, LN] x 3 -> y1 (192, H/32) -> quantize
      y1_hat -> [5x5 x2, LN, blocks] x 3 -> 1x1 -> f2 (C1, H/4)

y1 is quantized and its rate comes from a factorized prior (Ballé et al. 2018), so training under a weight on that rate
pushes out of f2 what is redundant. No bits of y1 are ever sent: the stream codes f2 by the compression network.

Sources: DICM (Tang, Yi, Wang 2025), Fig. 2; convolutional modulation from Conv2Former (Hou, Lu, Cheng, Feng 2022);
`convformer` is MetaFormer's block with separable convolution and StarReLU (Yu et al. 2022), from timm.
"""

from __future__ import annotations

import torch
from compressai.entropy_models import EntropyBottleneck
from timm.layers import LayerNorm2d
from timm.models.metaformer import MetaFormerBlock, SepConv, StarReLU
from torch import Tensor, nn
from torch.nn.functional import gelu

from pretrain.codec.config import CodecConfig
from pretrain.codec.entropy import bottleneck_likelihood
from pretrain.codec.tiles import in_strips

LAYER_SCALE = 1e-6


class Conv2FormerBlock(nn.Module):
    """x + g1 * proj(a(LN x) * v(LN x)), a = depthwise(GELU(1x1)); then x + g2 * MLP(LN x); (N, C, H, W) kept."""

    def __init__(self, channels: int, kernel: int):
        super().__init__()
        self.norm1 = LayerNorm2d(channels)
        self.attend = nn.Sequential(
            nn.Conv2d(channels, channels, 1),
            nn.GELU(),
            nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels),
        )
        self.value = nn.Conv2d(channels, channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)
        self.gamma1 = nn.Parameter(torch.full((channels, 1, 1), LAYER_SCALE))
        self.norm2 = LayerNorm2d(channels)
        self.fc1 = nn.Conv2d(channels, 4 * channels, 1)
        self.position = nn.Conv2d(4 * channels, 4 * channels, 3, padding=1, groups=4 * channels)
        self.fc2 = nn.Conv2d(4 * channels, channels, 1)
        self.gamma2 = nn.Parameter(torch.full((channels, 1, 1), LAYER_SCALE))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm1(x)
        x = x + self.gamma1 * self.proj(self.attend(normed) * self.value(normed))
        return in_strips(self._mlp, x, halo=1)

    def _mlp(self, x: Tensor) -> Tensor:
        hidden = gelu(self.fc1(self.norm2(x)))
        return x + self.gamma2 * self.fc2(hidden + gelu(self.position(hidden)))


def create_block(config: CodecConfig, channels: int) -> nn.Module:
    """A block of the kind `config.block` names."""
    if config.block == "conv2former":
        return Conv2FormerBlock(channels, config.re_kernel)
    return MetaFormerBlock(
        channels,
        token_mixer=SepConv,
        mlp_act=StarReLU,
        norm_layer=LayerNorm2d,
        use_nchw=True,
        layer_scale_init_value=None,
        res_scale_init_value=None,
    )


class RedundancyElimination(nn.Module):
    """f1 -> f2, both (N, C1, H/4, W/4), through y1 (N, re_latent, H/32, W/32).

    Noise stands in for rounding in training (Ballé et al. 2017); in eval mode y1 is rounded about its medians.
    """

    def __init__(self, channels: int, config: CodecConfig):
        super().__init__()
        width, latent = config.re_channels, config.re_latent
        widths = [width, width, width, latent]
        encoder: list[nn.Module] = [nn.Conv2d(channels, width, 1)]
        for depth, here, there in zip(config.re_depths, widths[:-1], widths[1:], strict=True):
            encoder += [create_block(config, here) for _ in range(depth)]
            encoder += [nn.Conv2d(here, there, 3, stride=2, padding=1), LayerNorm2d(there)]
        decoder: list[nn.Module] = []
        for depth, here, there in zip(reversed(config.re_depths), widths[:0:-1], widths[-2::-1], strict=True):
            decoder += [nn.ConvTranspose2d(here, there, 5, stride=2, padding=2, output_padding=1), LayerNorm2d(there)]
            decoder += [create_block(config, there) for _ in range(depth)]
        decoder.append(nn.Conv2d(width, channels, 1))
        self.encoder, self.decoder = nn.Sequential(*encoder), nn.Sequential(*decoder)
        self.entropy_bottleneck = EntropyBottleneck(latent)

    def encode(self, f1: Tensor) -> Tensor:
        """y1 of f1, not quantized."""
        return self.encoder(f1)

    def decode(self, y1_hat: Tensor) -> Tensor:
        """f2 of y1."""
        return self.decoder(y1_hat)

    def forward(self, f1: Tensor) -> tuple[Tensor, Tensor]:
        """f2, and the likelihoods of y1 in (0, 1]."""
        y1_hat, likelihoods = bottleneck_likelihood(self.entropy_bottleneck, self.encode(f1))
        return self.decode(y1_hat), likelihoods
