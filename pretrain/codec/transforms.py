"""The compression network's transforms: g_a, f2 (H/4) -> y2 (H/16), and its mirror g_s, y2_hat -> f3.

      f2 -> RGC(2) -> 5x5 /2 -> PReLU -> RGC(3) -> 3x3 -> RGC(4, global-local) -> 5x5 /2 -> y2
      C1                128                         192                            192

Source: DICM (Tang, Yi, Wang 2025), Fig. 3; names as in Ballé et al. 2018. The paper's LeakyReLU has a learnt slope
here, that starts at one: training begins with linear transforms (klt.py).
"""

from __future__ import annotations

from torch import nn

from pretrain.codec.config import CodecConfig
from pretrain.codec.gated_conv import RGCBlock


def _block(channels: int, order: int, kernel: int, global_local: bool = False) -> nn.Module:
    """A gated convolution of `order`; none at order 0, where a narrow codec saves its most expensive places.

    In the deepest place two convolutions would meet without it.
    """
    if order:
        return RGCBlock(channels, order, kernel, global_local)
    return nn.PReLU(channels, init=1.0) if global_local else nn.Identity()


class AnalysisTransform(nn.Sequential):
    """g_a: f2 (N, C1, H/4, W/4) -> y2 (N, latent_channels, H/16, W/16)."""

    def __init__(self, channels: int, config: CodecConfig):
        width, latent, kernel = config.transform_channels, config.latent_channels, config.rgc_kernel
        shallow, middle, deep = config.rgc_orders
        super().__init__(
            _block(channels, shallow, kernel),
            nn.Conv2d(channels, width, 5, stride=2, padding=2),
            nn.PReLU(width, init=1.0),
            _block(width, middle, kernel),
            nn.Conv2d(width, latent, 3, padding=1),
            _block(latent, deep, kernel, global_local=True),
            nn.Conv2d(latent, latent, 5, stride=2, padding=2),
        )

    @property
    def convolutions(self) -> tuple[nn.Conv2d, nn.Conv2d, nn.Conv2d]:
        """Those between the blocks, in order."""
        return self[1], self[4], self[6]  # type: ignore[return-value]


class SynthesisTransform(nn.Sequential):
    """g_s: y2_hat (N, latent_channels, H/16, W/16) -> f3 (N, C1, H/4, W/4)."""

    def __init__(self, channels: int, config: CodecConfig):
        width, latent, kernel = config.transform_channels, config.latent_channels, config.rgc_kernel
        shallow, middle, deep = config.rgc_orders
        super().__init__(
            nn.ConvTranspose2d(latent, latent, 5, stride=2, padding=2, output_padding=1),
            _block(latent, deep, kernel, global_local=True),
            nn.Conv2d(latent, width, 3, padding=1),
            _block(width, middle, kernel),
            nn.PReLU(width, init=1.0),
            nn.ConvTranspose2d(width, channels, 5, stride=2, padding=2, output_padding=1),
            _block(channels, shallow, kernel),
        )

    @property
    def convolutions(self) -> tuple[nn.ConvTranspose2d, nn.Conv2d, nn.ConvTranspose2d]:
        """Those between the blocks, in order."""
        return self[0], self[2], self[5]  # type: ignore[return-value]
