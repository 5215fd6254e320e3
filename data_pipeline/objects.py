"""Images at their own sizes with their objects: what detectors read.

What shards of other makers may hold is made good where it is read: boxes are cut to the image, and objects without
area, of a class that is not among the names, or with a mask of another size are left out. The survey does the same
before any work starts.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.cache import ShardCache
from data_pipeline.errors import DataError, SampleError
from data_pipeline.samples import (
    MIN_SIDE,
    SampleDataset,
    picture_of,
    to_tensor,
)
from data_pipeline.shards import facts_of
from data_pipeline.sources.annotations import OutlineError, clean_boxes, decode_mask, encode_mask
from data_pipeline.surveys import Survey, UnusableError, survey


class Objects(NamedTuple):
    """The K objects of an image.

    `ignored` are crowds and what VOC calls difficult: nothing is learned of them, and nothing is lost by finding them.
    """

    boxes: Tensor  # (K, 4) float32, x0 y0 x1 y1 in pixels, inside the image, with area
    labels: Tensor  # (K,) int64
    crowds: Tensor  # (K,) bool
    difficult: Tensor  # (K,) bool
    areas: Tensor  # (K,) float32, square pixels: as the source says, else of the mask or of the box
    masks: Tensor | None  # (K, H, W) uint8, zeros and ones; None where they were not asked for

    @property
    def ignored(self) -> Tensor:
        """(K,) bool."""
        return self.crowds | self.difficult


class ObjectSample(NamedTuple):
    """One image with its objects."""

    image: Tensor  # (3, H, W) uint8 RGB, upright
    objects: Objects
    index: int  # type: ignore[assignment]  # of the data set; hides tuple.index
    key: str


def read_objects(
    facts: dict[str, Any], width: int, height: int, num_classes: int, masks: bool
) -> tuple[Objects, Counter[str]]:
    """The objects that `facts`, a sample's JSON, tells of an image of width x height pixels, and what was left out.

    Args:
        masks: instance masks are wanted.

    Raises:
        UnusableError: the image is too small; it was never looked at for objects; masks are wanted and it has none.
        DataError: a field that is no list of what it should hold.
    """
    if min(width, height) < MIN_SIDE:
        raise UnusableError(f"image smaller than {MIN_SIDE} pixels")
    if facts.get("boxes") is None:
        raise UnusableError("image without boxes")
    for key in ("boxes", "labels", "masks", "areas", "iscrowd", "difficult"):
        if not isinstance(facts.get(key) or [], list):
            raise DataError(f"{key} are no list; build it again")
    count = len(facts["boxes"])
    if len(facts.get("labels") or []) != count:
        raise UnusableError("image with more or fewer labels than boxes")
    if masks and count and len(facts.get("masks") or []) != count:
        raise UnusableError("image without a mask for each box")
    for key in ("areas", "iscrowd", "difficult"):
        if facts.get(key) is not None and len(facts[key]) != count:
            raise DataError(f"{len(facts[key])} {key} for {count} boxes; build it again")
    try:
        if any(len(box) != 4 for box in facts["boxes"]):
            raise ValueError("a box has four sides")
        return _objects(facts, width, height, num_classes, masks)
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(f"boxes or labels are not numbers as they should be ({error}); build it again") from error


def _objects(
    facts: dict[str, Any], width: int, height: int, num_classes: int, masks: bool
) -> tuple[Objects, Counter[str]]:
    cleaned = clean_boxes(facts["boxes"], width, height)
    left_out: Counter[str] = Counter()
    left_out["box without area in the image"] += len(cleaned.dropped)
    left_out["box cut to the image"] += cleaned.num_clipped
    boxes_kept: list[list[float]] = []
    labels: list[int] = []
    numbers: list[int] = []  # of the objects kept, among those given
    outlines: list[np.ndarray] = []
    for box, number in zip(cleaned.boxes, cleaned.kept, strict=True):
        label = int(facts["labels"][number])
        if not 0 <= label < num_classes:
            left_out["object of unknown class"] += 1
            continue
        if masks:
            try:
                mask = decode_mask(facts["masks"][number], width, height)
            except OutlineError:
                left_out["object whose mask is damaged or of another size"] += 1
                continue
            if not mask.any():
                left_out["object whose mask is empty"] += 1
                continue
            outlines.append(mask)
        boxes_kept.append(box)
        labels.append(label)
        numbers.append(number)
    if not numbers:
        left_out["image without objects, kept as background"] += 1
    boxes = torch.tensor(boxes_kept, dtype=torch.float32).reshape(-1, 4)
    stacked = None
    if masks:
        stacked = torch.zeros((len(outlines), height, width), dtype=torch.uint8)
        for place, mask in zip(stacked, outlines, strict=True):
            place.copy_(torch.from_numpy(mask))
    measured = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    if stacked is not None:
        measured = stacked.sum(dim=(1, 2)).float()
    if facts.get("areas") is not None:
        measured = torch.tensor([facts["areas"][number] for number in numbers], dtype=torch.float32)
    objects = Objects(
        boxes,
        torch.tensor(labels, dtype=torch.int64),
        _flags(facts.get("iscrowd"), numbers),
        _flags(facts.get("difficult"), numbers),
        measured,
        stacked,
    )
    return objects, +left_out


def _flags(values: list[Any] | None, numbers: list[int]) -> Tensor:
    return torch.tensor([bool(values[number]) if values else False for number in numbers], dtype=torch.bool)


def survey_objects(
    root: str | Path, split: str, num_classes: int, masks: bool, cache: ShardCache | None = None
) -> Survey:
    """Look at every sample's annotations, not at its pixels; `found` counts the objects that are not ignored.

    Raises:
        DataError: no such split, a damaged shard, or a sample that cannot be read.
    """
    return survey(root, split, partial(_inspect, num_classes=num_classes, masks=masks), cache)


def _inspect(sample: dict[str, Any], num_classes: int, masks: bool) -> tuple[int, Counter[str]]:
    facts = facts_of(sample)
    # Only shards of other makers lack the size: then the picture has to tell.
    width, height = facts.get("width"), facts.get("height")
    if not (isinstance(width, int) and isinstance(height, int)):
        try:
            height, width = picture_of(sample).shape[:2]
        except SampleError as error:
            raise UnusableError("image that does not decode") from error
    objects, reasons = read_objects(facts, width, height, num_classes, masks)
    crowds = Counter({"crowd (iscrowd 1), of which nothing is learned": int(objects.crowds.sum())})
    return int((~objects.ignored).sum()), reasons + crowds


class ObjectDataset(SampleDataset[ObjectSample]):
    """Images with their objects.

    Args:
        max_side: pixels; larger images come shrunk, with their objects, as if the data set held them so.
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        usable: np.ndarray,
        num_classes: int,
        masks: bool,
        max_side: int | None = None,
        cache: ShardCache | None = None,
    ):
        super().__init__(root, split, usable, cache)
        self.num_classes, self.masks, self.max_side = num_classes, masks, max_side

    def load(self, sample: dict[str, Any], index: int, position: int | None) -> ObjectSample:
        """An image with its objects (SampleError: it does not decode, or is of another size than was noted)."""
        pixels, facts = picture_of(sample), facts_of(sample)
        height, width = pixels.shape[:2]
        noted = facts.get("width", width), facts.get("height", height)
        if noted != (width, height):
            raise SampleError(f"is {width} x {height}, not {noted[0]} x {noted[1]} as noted; build it again")
        objects, _ = read_objects(facts, width, height, self.num_classes, self.masks)
        return shrink(ObjectSample(to_tensor(pixels), objects, index, sample["__key__"]), self.max_side)


def shrink_image(image: Tensor, max_side: int | None) -> Tensor:
    """The image (3, H, W) uint8 with its longer side at most `max_side` pixels, antialiased."""
    height, width = image.shape[-2:]
    if max_side is None or max(height, width) <= max_side:
        return image
    scale = max_side / max(height, width)
    size = [max(MIN_SIDE, round(side * scale)) for side in (height, width)]
    return F.interpolate(image[None], size=size, mode="bilinear", antialias=True)[0]


def shrink(sample: ObjectSample, max_side: int | None) -> ObjectSample:
    """The sample with its longer side at most `max_side` pixels."""
    image = shrink_image(sample.image, max_side)
    if image is sample.image:
        return sample
    (height, width), (before_height, before_width) = image.shape[-2:], sample.image.shape[-2:]
    x, y = width / before_width, height / before_height
    objects, masks = sample.objects, sample.objects.masks
    if masks is not None:
        smaller = masks.new_zeros((len(masks), height, width))
        masks = F.interpolate(masks[None], size=(height, width), mode="nearest")[0] if len(masks) else smaller
    boxes = objects.boxes * torch.tensor([x, y, x, y])
    return sample._replace(image=image, objects=objects._replace(boxes=boxes, areas=objects.areas * x * y, masks=masks))


def mirror(sample: ObjectSample) -> ObjectSample:
    """The sample, left and right changed."""
    objects, width = sample.objects, sample.image.shape[-1]
    left, top, right, bottom = objects.boxes.unbind(1)
    boxes = torch.stack([width - right, top, width - left, bottom], dim=1)
    masks = None if objects.masks is None else objects.masks.flip(-1)
    return sample._replace(image=sample.image.flip(-1), objects=objects._replace(boxes=boxes, masks=masks))


def facts_from(objects: Objects, width: int, height: int) -> dict[str, Any]:
    """What `read_objects` reads, of the objects of an image."""
    facts = {
        "width": width, "height": height, "boxes": objects.boxes.tolist(), "labels": objects.labels.tolist(),
        "iscrowd": objects.crowds.tolist(), "difficult": objects.difficult.tolist(), "areas": objects.areas.tolist(),
    }  # fmt: skip
    if objects.masks is not None:
        facts["masks"] = [encode_mask(mask) for mask in objects.masks.numpy()]
    return facts
