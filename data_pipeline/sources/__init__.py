"""Sources of images: each reads one layout on disk and yields `Sample`s."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Sample:
    """One image as it came, with what its source knows of it."""

    image: bytes
    extension: str  # jpg, png or webp
    width: int = 0
    height: int = 0
    label: int | None = None
    boxes: list[list[float]] = field(default_factory=list)  # x0, y0, x1, y1 in pixels
    labels: list[int] = field(default_factory=list)  # class of each box
    masks: list[dict[str, Any]] = field(default_factory=list)  # COCO RLE of each box
    semantic: bytes | None = None  # PNG of class indexes, 255 to be ignored
    image_id: str | int | None = None

    def fields(self, key: str) -> dict[str, Any]:
        """The fields of a shard's sample; what the source does not have is left out."""
        facts: dict[str, Any] = {"width": self.width, "height": self.height}
        for name in ("label", "image_id"):
            if getattr(self, name) is not None:
                facts[name] = getattr(self, name)
        for name in ("boxes", "labels", "masks"):
            if getattr(self, name):
                facts[name] = getattr(self, name)
        sample = {"__key__": key, self.extension: self.image, "json": json.dumps(facts).encode()}
        return sample if self.semantic is None else {**sample, "mask.png": self.semantic}
