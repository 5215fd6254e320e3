"""What every layout gives: a listing of jobs, and samples made of them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from data_pipeline.errors import DataError
from data_pipeline.folders import Files, is_image

T = TypeVar("T")


class UnusableError(DataError):
    """One image that cannot be used: it is left out and listed, and the build goes on."""


@dataclass(frozen=True)
class Rejected:
    """Something of the source that is not in the data set as it was, and why.

    `what` is "image" (left out), "box" (dropped), "clipped" (boxes cut at the image's edge), "masks" (an image kept
    without them), "annotation" (of an image that is not there), "crowd" (kept; nothing is learned of it), "class" (kept
    without an image) or "file" (of a kind that is not read); `count` is how many of these.
    """

    file: str
    what: str
    reason: str
    count: int = 1


def unread(place: Path, files: Files, root: Path) -> list[Rejected]:
    """What lies in the folder `place` and is no image by its name, counted by suffix."""
    suffixes = Counter(path.suffix.lower() for path in files.paths if not is_image(path))
    name = str(place.relative_to(root))
    found = [
        Rejected(name, "file", f"{f'end in {suffix}' if suffix else 'have no suffix'}: not read", count)
        for suffix, count in sorted(suffixes.items())
    ]
    return found + [Rejected(str(path.relative_to(root)), "file", reason) for path, reason in files.others.items()]


@dataclass
class Sample:
    """One image as it came, with what its source knows of it; None is what the source does not say.

    `labels`, `masks`, `difficult`, `iscrowd` and `areas` have one entry for each box.
    """

    image: bytes
    extension: str  # jpg, png or webp
    width: int = 0
    height: int = 0
    label: int | None = None
    boxes: list[list[float]] | None = None  # x0, y0, x1, y1 in pixels, x1 and y1 exclusive; [] is "no object here"
    labels: list[int] | None = None  # class of each box
    masks: list[dict[str, Any]] | None = None  # COCO RLE, as pycocotools encodes it, of the image's size
    difficult: list[bool] | None = None  # VOC: not to be counted in evaluation
    iscrowd: list[int] | None = None  # COCO: 1 where a box holds many objects
    areas: list[float] | None = None  # COCO: pixels of each object, by which evaluation sorts small from large
    semantic: bytes | None = None  # 8-bit grey PNG, the index into the manifest's mask names, 255 to be ignored
    image_id: str | int | None = None
    remarks: list[Rejected] = field(default_factory=list)  # for the build's list; not part of a shard

    def fields(self, key: str) -> dict[str, Any]:
        """The fields of a shard's sample; what the source does not have is left out."""
        facts: dict[str, Any] = {"width": self.width, "height": self.height}
        for name in ("label", "image_id", "boxes", "labels", "masks", "difficult", "iscrowd", "areas"):
            if getattr(self, name) is not None:
                facts[name] = getattr(self, name)
        sample = {"__key__": key, self.extension: self.image, "json": json.dumps(facts).encode()}
        return sample if self.semantic is None else {**sample, "mask.png": self.semantic}


@dataclass(frozen=True)
class Job:
    """One image of a source and what its annotations say of it: small, picklable, equal for equal sources."""

    file: Path
    root: Path  # of the source; reports name files from here

    @property
    def name(self) -> str:
        """The image's path inside the source."""
        return str(self.file.relative_to(self.root))


@dataclass(frozen=True)
class Listing:
    """What a source holds.

    `classes` names the values of `label` and `labels`; `semantic_classes` those of semantic masks (empty where the
    source has none). `read` makes a job a sample; it raises `UnusableError` for an image to leave out, and any other
    DataError where the source contradicts itself and the build must not go on.
    """

    root: Path
    classes: tuple[str, ...]
    semantic_classes: tuple[str, ...]
    splits: dict[str, tuple[Job, ...]]
    rejected: tuple[Rejected, ...]
    read: Callable[[Any], Sample]


def choose_splits(
    available: Mapping[str, T], wanted: Mapping[str, str] | None, defaults: Mapping[str, str], root: Path
) -> dict[str, T]:
    """The splits to make, by their new names: those `wanted` (new name: source's name), or the defaults.

    Raises:
        DataError: a wanted split is not in the source.
    """
    chosen = defaults if wanted is None else wanted
    for new, old in chosen.items():
        if old not in available:
            raise DataError(f"{root}: no split {old!r} to make {new!r} of; it has {', '.join(available) or 'none'}")
    return {new: available[old] for new, old in chosen.items()}
