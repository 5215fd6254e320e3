"""The checkerboard context model: half of y2's places are coded first and help to predict the other half.

      anchors (row + column even): means, scales of the hyperprior
      others:                      those, corrected by a transformer that sees the decoded anchors

Two passes whatever the size of the picture, where a context model of one place at a time needs as many as there are
places. The others are masked at the transformer's input, so what it predicts depends on nothing that is not decoded.

Sources: checkerboard context (He et al. 2021); transformer-based entropy models (DICM, section III; Qian et al. 2022).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pretrain.codec.config import CodecConfig
from pretrain.codec.hyperprior import ViTBlock


def anchor_mask(latents: Tensor) -> Tensor:
    """(H, W) bool on the device of latents (..., H, W): the places that are coded first."""
    height, width = latents.shape[-2:]
    rows, columns = (torch.arange(side, device=latents.device) for side in (height, width))
    return (rows[:, None] + columns) % 2 == 0


class CheckerboardContext(nn.Module):
    """Corrects means and scales (N, latent_channels, H/16, W/16) of the places that are no anchors."""

    def __init__(self, config: CodecConfig):
        super().__init__()
        latent, dim = config.latent_channels, config.hyper_dim
        self.body = nn.Sequential(
            nn.Conv2d(3 * latent, dim, 1), *(ViTBlock(config) for _ in range(config.context_depth))
        )
        self.head = nn.Conv2d(dim, 2 * latent, 1)
        # Training starts from the hyperprior's own prediction.
        for parameter in self.head.parameters():
            nn.init.zeros_(parameter)

    def forward(self, y2_hat: Tensor, means: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
        """Means and scales of all places, the anchors' as given; of `y2_hat`, anchors alone are looked at."""
        anchors = anchor_mask(y2_hat)
        seen = torch.cat([y2_hat * anchors, means, scales], dim=1)
        mean_shift, scale_shift = self.head(self.body(seen)).chunk(2, dim=1)
        return torch.where(anchors, means, means + mean_shift), torch.where(anchors, scales, scales + scale_shift)
