"""3x3 convolutions over planes of a few places, as one matrix product where a CPU is faster that way.

At 64 px a ResNet's last layer sees planes of 2x2 places. oneDNN blocks its float32 convolutions over places, of which
there are too few: a forward and backward pass of 512 channels takes more than twice as long as one product of all
places of the batch, each with its neighbours beside it (`tests/benchmarks/small_planes.py`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Where the product is faster by far; with fewer channels or more places oneDNN has more to block over.
FEWEST_CHANNELS, MOST_PLACES = 512, 16


class SmallPlaneConv2d(nn.Conv2d):
    """A 3x3 convolution with padding 1, of any stride; the same but for the order in which it sums."""

    def forward(self, input: Tensor) -> Tensor:
        """(N, out_channels, h, w) of (N, in_channels, H, W)."""
        if self._has_small_planes(input):
            return self._product(input)
        return super().forward(input)

    def _has_small_planes(self, input: Tensor) -> bool:
        height, width = self._size(input)
        return (
            input.device.type == "cpu"
            and input.dtype == torch.float32
            and not torch.is_autocast_enabled("cpu")
            and not torch.compiler.is_compiling()
            and height * width <= MOST_PLACES
        )

    def _size(self, input: Tensor) -> tuple[int, int]:
        return tuple(-(-side // self.stride[0]) for side in input.shape[-2:])  # type: ignore[return-value]

    def _product(self, input: Tensor) -> Tensor:
        (height, width), step = self._size(input), self.stride[0]
        places = F.pad(input.movedim(1, -1), (0, 0, 1, 1, 1, 1))
        neighbours = [
            places[:, row : row + step * height : step, column : column + step * width : step]
            for row in range(3)
            for column in range(3)
        ]
        weight = self.weight.permute(0, 2, 3, 1).flatten(1)
        return F.linear(torch.cat(neighbours, dim=-1), weight, self.bias).movedim(-1, 1)


def use_products(network: nn.Module) -> None:
    """Let the convolutions of `network` that can gain by it choose; parameters, and their names, stay what they are."""
    for module in network.modules():
        if (
            type(module) is nn.Conv2d
            and module.kernel_size == (3, 3)
            and module.padding == (1, 1)
            and module.dilation == (1, 1)
            and module.stride in ((1, 1), (2, 2))
            and module.groups == 1
            and module.out_channels >= FEWEST_CHANNELS
        ):
            module.__class__ = SmallPlaneConv2d
