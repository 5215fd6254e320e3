"""Large pictures piece by piece: in tiles, so that memory follows the tile and not the picture, or in strips.

Each tile is computed with a margin around it that is then cut away. A network whose receptive field is within the
margin gives the same values as for the whole picture; ours sees farther, through its large kernels and the Fourier
half of its filters, so values near seams differ a little. Only networks at the picture's own resolution run in tiles:
the stream is that of a whole picture, and either end may use tiles or not.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pretrain.errors import CodecError

MARGIN = 64  # pixels
TILE_STEP = 64
# Positions of a strip: the hidden layer of an MLP over so many stays in the caches of a core. A GPU wants few, large
# operators; there strips only bound the memory that a very large picture takes.
STRIP_POSITIONS = {"cpu": 3072}
GPU_STRIP_POSITIONS = 2**20


def check_tile(tile: int) -> None:
    """Refuse sides that the codec's strides do not divide (CodecError)."""
    if tile < TILE_STEP or tile % TILE_STEP:
        raise CodecError(f"tile={tile} must be a positive multiple of {TILE_STEP} pixels")


def in_tiles(network: Callable[[Tensor], Tensor], inputs: Tensor, tile: int, margin: int) -> Tensor:
    """`network` over inputs (N, C, H, W), computed in squares of `tile` with `margin` around each.

    Args:
        network: (N, C, h, w) to (N, D, h * s, w * s) with a fixed factor s; `tile` and `margin` times s are whole.
    """
    height, width = inputs.shape[-2:]
    if height <= tile and width <= tile:
        return network(inputs)
    whole: Tensor | None = None
    for top in range(0, height, tile):
        for left in range(0, width, tile):
            bottom, right = min(top + tile, height), min(left + tile, width)
            first_row, first_column = max(top - margin, 0), max(left - margin, 0)
            piece = inputs[..., first_row : bottom + margin, first_column : right + margin]
            output = network(piece)

            def scaled(length: int, factor: tuple[int, int] = (output.shape[-1], piece.shape[-1])) -> int:
                return length * factor[0] // factor[1]

            if whole is None:
                whole = output.new_empty(*output.shape[:2], scaled(height), scaled(width))
            rows = slice(scaled(top - first_row), scaled(bottom - first_row))
            columns = slice(scaled(left - first_column), scaled(right - first_column))
            whole[..., scaled(top) : scaled(bottom), scaled(left) : scaled(right)] = output[..., rows, columns]
    assert whole is not None
    return whole


def in_strips(function: Callable[[Tensor], Tensor], inputs: Tensor, halo: int = 0) -> Tensor:
    """`function` over inputs (N, C, H, W), in strips of rows where no gradient is wanted: equal values, less memory.

    Args:
        function: (N, C, h, W) to (N, D, h, W), each row of which follows from the rows at most `halo` above and below;
            beyond the picture it must see what it would see there, as convolutions with padding do.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return function(inputs)
    height, width = inputs.shape[-2:]
    rows = max(STRIP_POSITIONS.get(inputs.device.type, GPU_STRIP_POSITIONS) // (width * len(inputs)), 1)
    if height <= rows:
        return function(inputs)
    strips = []
    for top in range(0, height, rows):
        first = max(top - halo, 0)
        strip = function(inputs[..., first : top + rows + halo, :])
        strips.append(strip[..., top - first : top - first + rows, :])
    return torch.cat(strips, dim=-2)
