"""Boxes and outlines as sources give them, made to what a shard promises."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask as rle

DECIMALS = 4  # of a pixel; sources write two
TOLERANCE = 1.0  # pixel: sources round, and count pixels from 0 or from 1


class CleanBoxes(NamedTuple):
    """Boxes inside the image, which of the given ones they are, and what happened to the others."""

    boxes: list[list[float]]  # x0 < x1, y0 < y1 in pixels, inside the image
    kept: list[int]  # index of each among the given boxes
    dropped: list[int]  # indexes of those without area in the image
    num_clipped: int  # of those kept, how many reached beyond the image by more than `TOLERANCE`


def clean_boxes(boxes: Sequence[Sequence[float]], width: int, height: int) -> CleanBoxes:
    """Clip boxes (x0, y0, x1, y1) to an image of width x height pixels and drop those left without area."""
    given = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    finite = np.isfinite(given).all(axis=1)
    given = np.where(finite[:, None], given, 0).round(DECIMALS)
    limits = np.array([width, height, width, height], dtype=np.float64)
    inside = np.clip(given, 0, limits)
    sound = finite & (inside[:, 0] < inside[:, 2]) & (inside[:, 1] < inside[:, 3])
    clipped = sound & (np.abs(inside - given) > TOLERANCE).any(axis=1)
    return CleanBoxes(
        inside[sound].tolist(), np.flatnonzero(sound).tolist(), np.flatnonzero(~sound).tolist(), int(clipped.sum())
    )


class OutlineError(ValueError):
    """An outline that describes no mask."""


class OtherSizeError(OutlineError):
    """A mask of another size than the image."""


def outline_mask(outline: Any, width: int, height: int) -> dict[str, Any]:
    """COCO RLE {"size": [height, width], "counts": str} of an outline of an image of width x height pixels.

    Args:
        outline: polygons [[x0, y0, x1, y1, ...], ...], or an RLE, its counts a list or a string.

    Raises:
        OtherSizeError: an RLE of another size.
        OutlineError: no polygon of three points or more, or an RLE whose runs do not fill its size.
    """
    if isinstance(outline, dict):
        return _recode(outline, width, height)
    polygons = [polygon for polygon in outline or () if len(polygon) >= 6 and len(polygon) % 2 == 0]
    if not polygons:
        raise OutlineError("has no polygon of three points or more")
    if not all(np.isfinite(np.asarray(polygon, dtype=np.float64)).all() for polygon in polygons):
        raise OutlineError("has a corner that is no finite number")
    return encode_mask(rle.decode(rle.merge(rle.frPyObjects(polygons, height, width))))


def _recode(outline: dict[str, Any], width: int, height: int) -> dict[str, Any]:
    size, counts = outline.get("size"), outline.get("counts")
    if size != [height, width]:
        shown = f"{size[1]} x {size[0]}" if isinstance(size, list) and len(size) == 2 else repr(size)
        raise OtherSizeError(f"is a mask of {shown}, the image is {width} x {height}")
    if isinstance(counts, list):
        if any(not isinstance(run, int) or run < 0 for run in counts) or sum(counts) != width * height:
            raise OutlineError(f"has runs that do not add up to {width} x {height} pixels")
        return encode_mask(rle.decode(rle.frPyObjects(outline, height, width)))
    check_mask(outline, width, height)
    return {"size": [height, width], "counts": counts}


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """COCO RLE of a mask (H, W) of zeros and ones, its counts a string, as JSON needs it."""
    code = rle.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(code["size"]), "counts": code["counts"].decode()}


def check_mask(mask: Any, width: int, height: int) -> None:
    """See that `mask` is a COCO RLE of an image of width x height pixels, as pycocotools encodes it.

    Raises:
        OutlineError: it is not.
    """
    if not isinstance(mask, dict) or mask.get("size") != [height, width] or not isinstance(mask.get("counts"), str):
        size = mask.get("size") if isinstance(mask, dict) else mask
        raise OutlineError(f"is not a COCO RLE of size {[height, width]} (height, width) but of {size!r}")
    try:
        # pycocotools reads a code that is too short without a word; encoding what it read again shows it.
        sound = encode_mask(rle.decode(mask)) == mask
    except ValueError as error:
        raise OutlineError(f"is a damaged COCO RLE ({error})") from error
    if not sound:
        raise OutlineError(f"is a damaged COCO RLE (its runs do not fill {width} x {height} pixels)")
