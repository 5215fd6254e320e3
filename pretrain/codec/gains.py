"""One codec, a range of rates: gains that widen a latent's symbols before they are rounded.

A gain of 2 halves the quantization step of a channel. Each trained rate point has a vector of gains; rates in between
interpolate their logarithms, so that steps grow geometrically, as rates and distortions do.

Sources: gain units (Cui et al. 2021, "Asymmetric gained deep image compression with continuous rate adaptation"), here
with the reciprocal on the reader's side, which makes a gain the step of a uniform quantizer.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pretrain.errors import CodecError

# Where training starts: the steps of the lowest and the highest rate differ by a factor of e.
LOG_SPREAD = 0.5


class RateGains(nn.Module):
    """Gains of `channels` at each of `points` rates, the lowest first; rate 0..1 runs from the first to the last."""

    def __init__(self, points: int, channels: int, spread: float = 0.0):
        super().__init__()
        self.log_gain = nn.Parameter(torch.linspace(-spread, spread, points)[:, None].repeat(1, channels))

    @classmethod
    def of(cls, log_gain: Tensor) -> RateGains:
        """Frozen gains of a trained table (points, channels), in float64."""
        gains = cls(*log_gain.shape).double().requires_grad_(False)
        gains.log_gain.copy_(log_gain)
        return gains

    def forward(self, rate: Tensor) -> Tensor:
        """Gains (N, channels, 1, 1) at rates (N,) in 0..1, in the parameters' type."""
        last = len(self.log_gain) - 1
        position = rate.to(self.log_gain) * last
        below = position.floor().clamp(0, last - 1).long()
        weight = (position - below)[:, None]
        log_gain = torch.lerp(self.log_gain[below], self.log_gain[below + 1], weight)
        return log_gain.exp()[..., None, None]


def fit(stream_at: Callable[[int | None], bytes], level: int | None, max_bytes: int) -> bytes:
    """The longest stream of at most `max_bytes` at a rate up to `level`, found by bisection (CodecError: none is)."""
    best = stream_at(level)
    if len(best) <= max_bytes:
        return best
    fewest = best if level is None else stream_at(0)
    if len(fewest) > max_bytes:
        remedy = "train a codec with a range of rates (codec.rate_points)" if level is None else "resize the image"
        raise CodecError(f"max_bytes={max_bytes}: the smallest stream of this image has {len(fewest)}; {remedy}")
    best, low, high = fewest, 0, level or 0
    while high - low > 1:
        middle = (low + high) // 2
        stream = stream_at(middle)
        if len(stream) <= max_bytes:
            best, low = stream, middle
        else:
            high = middle
    return best
