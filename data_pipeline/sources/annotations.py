"""Boxes and outlines as sources give them, made to what a shard promises."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask as rle

from data_pipeline.errors import DataError

DECIMALS = 4  # of a pixel; sources write two
MAX_SHIFT = 30  # bits: pycocotools' numbers end there
FAR = 1000  # pixels from the corner of the image, or ten of its sides, to which a polygon is drawn
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
    finite = np.logical_and.reduce(np.isfinite(given), axis=1)
    given = np.where(finite[:, None], given, 0).round(DECIMALS)
    limits = np.array([width, height, width, height], dtype=np.float64)
    inside = np.clip(given, 0, limits)
    sound = finite & (inside[:, 0] < inside[:, 2]) & (inside[:, 1] < inside[:, 3])
    clipped = sound & (np.abs(inside - given) > TOLERANCE).any(axis=1)
    return CleanBoxes(
        inside[sound].tolist(), np.flatnonzero(sound).tolist(), np.flatnonzero(~sound).tolist(), int(clipped.sum())
    )


class OutlineError(DataError):
    """An outline that describes no mask."""


class OtherSizeError(OutlineError):
    """A mask of another size than the image."""


def outline_mask(outline: Any, width: int, height: int) -> dict[str, Any]:
    """COCO RLE {"size": [height, width], "counts": str} of an outline of an image of width x height pixels.

    Args:
        outline: polygons [[x0, y0, x1, y1, ...], ...], or an RLE, its counts a list or a string.

    Raises:
        OtherSizeError: an RLE of another size.
        OutlineError: no polygon of three points or more, one that reaches far away, or an RLE whose runs do not fill
            its size.
    """
    if isinstance(outline, dict):
        return _recode(outline, width, height)
    polygons = [polygon for polygon in outline or () if len(polygon) >= 6 and len(polygon) % 2 == 0]
    if not polygons:
        raise OutlineError("has no polygon of three points or more")
    # Drawing takes memory for every pixel of an edge, inside the image or not; not a number fails as well.
    limit = max(FAR, 10 * width, 10 * height)
    if not all((np.abs(np.asarray(polygon, dtype=np.float64)) <= limit).all() for polygon in polygons):
        raise OutlineError(f"has a corner beyond {limit} pixels")
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


def decode_mask(mask: Any, width: int, height: int) -> np.ndarray:
    """(height, width) uint8 of zeros and ones: a COCO RLE, checked first.

    Raises:
        OutlineError: as `check_mask`.
    """
    check_mask(mask, width, height)
    return rle.decode(mask)


def check_mask(mask: Any, width: int, height: int) -> None:
    """See that `mask` is a COCO RLE of an image of width x height pixels, its counts a string.

    pycocotools takes a damaged string as it comes: it reads and writes beyond its memory, or leaves pixels undefined.

    Raises:
        OutlineError: it is not.
    """
    if not isinstance(mask, dict) or mask.get("size") != [height, width] or not isinstance(mask.get("counts"), str):
        size = mask.get("size") if isinstance(mask, dict) else mask
        raise OutlineError(f"is not a COCO RLE of size {[height, width]} (height, width) but of {size!r}")
    runs = _runs(mask["counts"])
    if min(runs, default=0) < 0 or sum(runs) != width * height:
        raise OutlineError(f"is a damaged COCO RLE (its runs do not fill {width} x {height} pixels)")


def _runs(counts: str) -> list[int]:
    """Lengths of the runs in the string of a COCO RLE.

    A character holds six bits above "0": five of a number, lowest first, and one that more follow; the highest bit of
    the last is the sign. From the fourth run on, a number is the difference to the run before the last.
    """
    runs: list[int] = []
    number = shift = 0
    for character in counts:
        bits = ord(character) - ord("0")
        if not 0 <= bits < 64 or shift > MAX_SHIFT:
            raise OutlineError(f"is a damaged COCO RLE ({character!r} is out of place in its counts)")
        number |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            number -= 1 << shift
        runs.append(number + (runs[-2] if len(runs) > 2 else 0))
        number = shift = 0
    if shift:
        raise OutlineError("is a damaged COCO RLE (its counts are cut off)")
    return runs
