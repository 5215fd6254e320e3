"""Which channels of a latent a task gets: gates over y_hat (N, C, h, w).

    y_hat -> global average pool -> 1x1 -> ReLU -> 1x1 -> 2C logits -> Gumbel-softmax -> {0, 1}^C

A channel that is not chosen does not exist for the task: it is neither sent nor computed with. In training, where
images of a batch differ in their choice, it is multiplied by zero, which gives the same values and gradients.

Source: Liu, Sun, Katto 2022, section 2.2 and Fig. 3; `variance` is the rule of Wang, Qin, Chen 2022 as Liu describes it
(section 1): keep the channels of the largest variance.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from downstream.errors import TaskError

GATES = ("dynamic", "static", "variance", "none")


class DynamicGate(nn.Module):
    """A choice for each image, learned.

    Args:
        channels: C of the latent.
        hidden: width between the two convolutions; C where None.
    """

    def __init__(self, channels: int, hidden: int | None = None):
        super().__init__()
        self.channels = self.num_inputs = channels
        self.score = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, hidden or channels, 1),
            nn.ReLU(),
            nn.Conv2d(hidden or channels, 2 * channels, 1),
        )

    def choose(self, y_hat: Tensor) -> Tensor:
        """Each channel of y_hat (N, C, h, w) chosen or not: (N, C) of exactly 0 and 1, at least one of an image.

        In training mode a sample, with the gradient of its probability (straight through); in eval mode the likelier.
        """
        with torch.autocast(y_hat.device.type, enabled=False):
            logits = self._logits(y_hat)
            drawn = F.gumbel_softmax(logits, tau=1.0, dim=1) if self.training else logits.softmax(dim=1)
            soft = drawn[:, 1]
            best = F.one_hot(soft.argmax(dim=1), self.channels).bool()
            chosen = ((soft > 0.5) | best).to(soft.dtype)
            # Not torch's `hard=True`: its 1 - p + p is not always 1, and what is trained on would not be what is sent.
            return chosen + (soft - soft.detach())

    def forward(self, y_hat: Tensor) -> Tensor:
        """y_hat with the channels that are not chosen at zero."""
        return y_hat * self.choose(y_hat)[..., None, None].to(y_hat.dtype)

    @torch.no_grad()
    def probabilities(self, y_hat: Tensor) -> Tensor:
        """(N, C): how likely each channel is to be chosen."""
        return self._logits(y_hat).softmax(dim=1)[:, 1]

    def _logits(self, y_hat: Tensor) -> Tensor:
        """(N, 2, C): not chosen, chosen (Liu, section 2.2.2)."""
        return self.score(y_hat.float()).flatten(1).unflatten(1, (2, self.channels))

    @torch.no_grad()
    def choice(self, y_hat: Tensor) -> list[int]:
        """The channels chosen of one image's y_hat (C, h, w): what its stream carries."""
        score = next(self.parameters())
        return self.choose(y_hat[None].to(score.device))[0].nonzero()[:, 0].tolist()


class StaticGate(nn.Module):
    """The same channels of every image.

    Args:
        channels: C of the latent.
        chosen: the channels, each once (TaskError otherwise).
    """

    chosen: Tensor

    def __init__(self, channels: int, chosen: Sequence[int]):
        super().__init__()
        if not chosen or len(set(chosen)) < len(chosen) or not 0 <= min(chosen) <= max(chosen) < channels:
            raise TaskError(f"channels {list(chosen)[:8]} must be one or more of 0..{channels - 1}, each once")
        self.channels, self.num_inputs = channels, len(chosen)
        self.register_buffer("chosen", torch.tensor(sorted(chosen)))

    def forward(self, y_hat: Tensor) -> Tensor:
        """(N, number chosen, h, w): the chosen channels, ascending."""
        return y_hat[:, self.chosen]

    @property
    def choice(self) -> list[int]:
        """The channels of every stream."""
        return self.chosen.tolist()


class NoGate(nn.Identity):
    """All channels; `channels` of them."""

    choice = None

    def __init__(self, channels: int):
        super().__init__()
        self.channels = self.num_inputs = channels


Gate = DynamicGate | StaticGate | NoGate


def create_gate(kind: str, channels: int, chosen: Sequence[int] | None = None) -> Gate:
    """A gate by name over a latent of `channels`.

    Args:
        kind: one of `GATES`.
        chosen: the channels of a static gate; `variance` is one with channels that `most_varied` gives.

    Raises:
        TaskError: no such gate; `chosen` missing, or given to a gate that chooses by itself.
    """
    if kind not in GATES:
        raise TaskError(f"gate={kind} is unknown; use one of {', '.join(GATES)}")
    if kind in ("static", "variance"):
        if chosen is None:
            raise TaskError(f"gate={kind} needs its channels; `dicm select-channels RUN` names them for gate=static")
        return StaticGate(channels, chosen)
    if chosen is not None:
        raise TaskError(f"gate={kind} takes no list of channels; use gate=static")
    return DynamicGate(channels) if kind == "dynamic" else NoGate(channels)
