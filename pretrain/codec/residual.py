"""How residual branches begin: at zero, so that a fresh block is the identity and learns at full speed at once.

Layer scales of 1e-6, which HorNet begins with, need a long training to grow.

Source: Zhang, Dauphin, Ma 2019, "Fixup Initialization: Residual Learning Without Normalization".
"""

from __future__ import annotations

from torch import nn


def begin_at_zero(*last_layers: nn.Module) -> None:
    """Set the parameters of the layers that residual branches end with to zero, in place."""
    for layer in last_layers:
        for parameter in layer.parameters():
            nn.init.zeros_(parameter)
