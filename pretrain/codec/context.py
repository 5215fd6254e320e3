"""Context models: y2 is coded in steps, and what is decoded already helps to predict what comes next.

    checkerboard    anchors, the places with row + column even; then the others
    space_channel   these two steps for each of three groups of channels, the narrowest first

As many steps whatever the size of the picture, where a model that reads one place after another takes as many as there
are places. One network serves all steps. It sees the hyperprior's means and scales, how far decoded values lie off
these means, and which step it is; values that are not decoded yet are no part of its input, so what it predicts depends
on none of them.

Sources: checkerboard context (He et al. 2021); uneven groups of channels, each in a checkerboard (ELIC, He et al.
2022); transformer-based entropy models (DICM, section III; Qian et al. 2022).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.codec.config import CodecConfig
from pretrain.codec.hyperprior import ViTBlock

# Places of a step (C, H, W) bool; means and scales (N, C, H, W) that hold there -> y2_hat (N, C, H, W) for there.
Code = Callable[[Tensor, Tensor, Tensor], Tensor]
# The number of a step, what was seen before it (N, hyper_dim, H, W), means and scales -> these, corrected.
Correct = Callable[[int, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class Step(NamedTuple):
    """What is coded at once: channels `first` to `end` - 1, where row + column is even (`parity` 0) or odd."""

    first: int
    end: int
    parity: int

    def places(self, latents: Tensor) -> Tensor:
        """(C, H, W) bool on the device of latents (..., C, H, W)."""
        channels = torch.arange(latents.shape[-3], device=latents.device)[:, None, None]
        return (self.first <= channels) & (channels < self.end) & self.squares(latents)

    def squares(self, latents: Tensor) -> Tensor:
        """(H, W) bool: those places whatever the channel."""
        rows, columns = (torch.arange(side, device=latents.device) for side in latents.shape[-2:])
        return (rows[:, None] + columns) % 2 == self.parity


def coding_steps(config: CodecConfig) -> list[Step]:
    """The steps of `config.context`, in order. A KLT's first channels say most, so the first groups are narrow."""
    latent = config.latent_channels
    bounds = {"checkerboard": (0, latent), "space_channel": (0, latent // 12, latent // 3, latent)}[config.context]
    return [Step(*group, parity) for group in pairwise(sorted(set(bounds))) for parity in (0, 1)]


class ContextModel(nn.Module):
    """Corrects the hyperprior's means and scales of y2 (N, latent_channels, H/16, W/16), step by step."""

    def __init__(self, config: CodecConfig):
        super().__init__()
        latent, dim = config.latent_channels, config.hyper_dim
        self.steps = coding_steps(config)
        self.priors = nn.Conv2d(2 * latent, dim, 1)
        # Attention alone takes long to learn what a convolution says at once: values go on from neighbour to neighbour.
        self.neighbours = nn.Conv2d(latent, dim, 5, padding=2, bias=False)
        self.turns = nn.Parameter(0.02 * torch.randn(len(self.steps), 2, dim))  # of a step: at its places, elsewhere
        self.blocks = nn.Sequential(*(ViTBlock(config) for _ in range(config.context_depth)))
        self.head = nn.Conv2d(dim, 2 * latent, 1)
        # Training starts from the hyperprior's own prediction.
        for parameter in self.head.parameters():
            nn.init.zeros_(parameter)

    def forward(self, number: int, seen: Tensor, means: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
        """The hyperprior's means and scales, corrected for the places of step `number` by what was `seen` before it."""
        here, elsewhere = self.turns[number, :, :, None, None]
        turn = torch.where(self.steps[number].squares(means), here, elsewhere)
        mean_shift, scale_shift = self.head(self.blocks(seen + turn)).chunk(2, dim=1)
        return means + mean_shift, scales + scale_shift

    def predict(
        self, means: Tensor, scales: Tensor, code: Code, correct: Correct | None = None
    ) -> tuple[Tensor, Tensor]:
        """Means and scales of all of y2 (N, C, H, W): the hyperprior's in the first step, corrected ones behind it.

        Args:
            means, scales: the hyperprior's.
            code: called once for each step, with the means and scales of its places and of those before them.
            correct: runs `forward`; itself if not given.
        """
        correct = correct or self
        seen = self.priors(torch.cat([means, scales], dim=1))
        all_means, all_scales = means, scales
        for number, step in enumerate(self.steps):
            places = step.places(means)
            if number:
                corrected = correct(number, seen, means, scales)
                all_means, all_scales = (
                    torch.where(places, new, old) for new, old in zip(corrected, (all_means, all_scales), strict=True)
                )
            y2_hat = code(places, all_means, all_scales)
            if number < len(self.steps) - 1:
                seen = seen + self._seen_in(step, y2_hat - means)
        return all_means, all_scales

    def _seen_in(self, step: Step, offsets: Tensor) -> Tensor:
        """What neighbours see more of once `step` is decoded: the convolution is linear in its input."""
        channels = slice(step.first, step.end)
        decoded = torch.where(step.squares(offsets), offsets[:, channels], 0)
        return F.conv2d(decoded, self.neighbours.weight[:, channels], padding=self.neighbours.padding)
