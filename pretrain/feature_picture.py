"""A picture of features: their three strongest directions as red, green and blue."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LOW, HIGH = 0.01, 0.99  # quantiles of a component that become black and full colour


def feature_picture(features: Tensor, scale: int = 4) -> Tensor:
    """The first three principal components over the positions of features (C, h, w), (3, scale * h, scale * w) uint8.

    Each component fills its own colour from its 1st to its 99th percentile; one that is constant, or that fewer
    than three channels do not have, stays black. The same features give the same picture: an eigendecomposition
    draws nothing, and a direction's sign, which is arbitrary, makes its largest entry positive.
    """
    channels, height, width = features.shape
    flat = features.detach().double().reshape(channels, -1)
    flat = flat - flat.mean(dim=1, keepdim=True)
    noise = torch.finfo(torch.float32).eps * features.abs().max()
    _, directions = torch.linalg.eigh(flat @ flat.T)
    directions = directions[:, -3:].flip(1)
    largest = directions.gather(0, directions.abs().argmax(dim=0, keepdim=True))
    components = F.pad((directions * largest.sign()).T @ flat, (0, 0, 0, max(3 - channels, 0)))
    # One by one: torch.quantile takes 2^24 values, which three components of a large image exceed.
    scaled = torch.stack([_stretch(component, noise) for component in components]).view(3, height, width)
    return scaled.repeat_interleave(scale, dim=1).repeat_interleave(scale, dim=2)


def _stretch(component: Tensor, noise: Tensor) -> Tensor:
    """A component as uint8; black where it varies no more than `noise`, which is not to fill a colour."""
    low, high = component.quantile(torch.tensor([LOW, HIGH], dtype=component.dtype, device=component.device))
    if high - low <= noise:
        return torch.zeros_like(component, dtype=torch.uint8)
    return ((component - low) / (high - low)).clamp(0, 1).mul(255).round().to(torch.uint8)
