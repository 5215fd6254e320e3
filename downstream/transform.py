"""From chosen channels of a latent (H/16) to the input of a network's layer2 (H/4): the transforms of Liu.

    deconv   5x5 /2 up -> BN, ReLU -> 5x5 /2 up
    res      3x3 -> BN -> residual -> 3x3, PixelShuffle -> residual -> residual -> 3x3, PixelShuffle

and one for latents of the feature codec, which has learned without labels already to give f3 of them:

    synthesis    the codec's g_s, a copy to go on with

All begin with one convolution over the latent. Where only some channels were sent, that convolution runs over these
alone, with their part of its weights.

Source: Liu, Sun, Katto 2022, section 2.3 and Fig. 4 (`deconv` after Ballé et al. 2018, `res` after Cheng et al. 2020).
The figure gives no widths; those here give `res` about twice the multiply-adds of `deconv`, as in Table 2, where F is
that of a ResNet-50.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch.nn.functional as F
from compressai.layers import ResidualBlock, subpel_conv3x3
from torch import Tensor, nn

from downstream.errors import TaskError
from pretrain.codec.transforms import SynthesisTransform

NEW_TRANSFORMS = ("deconv", "res")  # of latents of any model
TRANSFORMS = (*NEW_TRANSFORMS, "synthesis")
WIDTH = 128


class LatentTransform(nn.Module):
    """Features (N, out_channels, 4h, 4w) of latents (N, in_channels, h, w).

    Args:
        kind: one of `TRANSFORMS` (TaskError otherwise).
        width: channels between the two steps of upsampling; of `synthesis` they are the codec's.
        synthesis: the codec's, of in_channels and out_channels.
    """

    def __init__(
        self,
        kind: str,
        in_channels: int,
        out_channels: int,
        width: int = WIDTH,
        synthesis: SynthesisTransform | None = None,
    ):
        super().__init__()
        if kind not in TRANSFORMS:
            raise TaskError(f"transform={kind} is unknown; use one of {', '.join(TRANSFORMS)}")
        self.first: nn.Conv2d | nn.ConvTranspose2d
        # Latents of codecs differ in their scale by orders of magnitude; one normalisation lets one learning rate fit.
        if kind == "synthesis":
            if synthesis is None:
                raise TaskError("transform=synthesis is the codec's own; it needs latents=codec")
            own = copy.deepcopy(synthesis).requires_grad_(True)
            given = own.convolutions[-1].out_channels
            if given != out_channels:
                raise TaskError(
                    f"transform=synthesis gives {given} channels, the network reads {out_channels}; leave backbone "
                    "out, which makes it the codec's, or use transform=deconv"
                )
            self.first, self.body = own.convolutions[0], nn.Sequential(*list(own)[1:])
        elif kind == "deconv":
            self.first = _up(in_channels, width)
            self.body = nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(inplace=True), _up(width, out_channels))
        else:
            self.first = nn.Conv2d(in_channels, width, 3, padding=1)
            self.body = nn.Sequential(
                nn.BatchNorm2d(width),
                ResidualBlock(width, width),
                subpel_conv3x3(width, width, 2),
                ResidualBlock(width, width),
                ResidualBlock(width, width),
                subpel_conv3x3(width, out_channels, 2),
            )

    def forward(self, latents: Tensor, channels: Sequence[int] | None = None) -> Tensor:
        """Features of latents that hold `channels` of the input, in this order; all of them where None."""
        if channels is None:
            return self.body(self.first(latents))
        first, chosen = self.first, list(channels)
        if isinstance(first, nn.Conv2d):
            return self.body(F.conv2d(latents, first.weight[:, chosen], first.bias, padding=first.padding))
        padding, extra = (2, 2), (1, 1)  # those of `_up`
        return self.body(F.conv_transpose2d(latents, first.weight[chosen], first.bias, 2, padding, extra))


def _up(in_channels: int, out_channels: int) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(in_channels, out_channels, 5, stride=2, padding=2, output_padding=1)
