"""Large pictures piece by piece, so that memory follows the tile and not the picture.

Each tile is computed with a margin around it that is then cut away. A network whose receptive field is within the
margin gives the same values as for the whole picture; ours sees farther, through its large kernels and the Fourier
half of its filters, so values near seams differ a little. Only networks at the picture's own resolution run in tiles:
the stream is that of a whole picture, and either end may use tiles or not.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from pretrain.errors import CodecError

MARGIN = 64  # pixels
STEP = 64


def check_tile(tile: int) -> None:
    """Refuse sides that the codec's strides do not divide (CodecError)."""
    if tile < STEP or tile % STEP:
        raise CodecError(f"tile={tile} must be a positive multiple of {STEP} pixels")


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
