"""What is in a data set: counts, sizes, classes, and a contact sheet of its images."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from pycocotools import mask as rle

from data_pipeline.errors import DataError
from data_pipeline.loader import decode_image
from data_pipeline.shards import IMAGE_EXTENSIONS, Manifest, ShardReader

COLOURS = (
    "#e6194b", "#3cb44b", "#ffe119", "#4363d8", "#f58231", "#b45cd6", "#46f0f0", "#f032e6", "#bcf60c", "#fabebe",
)  # fmt: skip
TILE, CAPTION, MARGIN = 160, 16, 2
MIN_NAMED = 40  # least width of a box in the sheet that has room for its name


@dataclass(frozen=True)
class SplitFacts:
    """Counts of one split, from its samples' JSON."""

    samples: int
    bytes: int
    shards: int
    widths: tuple[int, int]  # least and greatest, pixels
    heights: tuple[int, int]
    labels: Counter[int]  # images of each class
    boxes: int
    masks: int
    semantic: int  # images with semantic classes


def split_facts(root: Path, manifest: Manifest, name: str, progress: Callable[[], None] | None = None) -> SplitFacts:
    """Read through a split and count; `progress` is called after each sample."""
    split = manifest.split(name)
    reader = ShardReader(root, split)
    widths, heights, labels, boxes, masks, semantic = [], [], Counter[int](), 0, 0, 0
    for index in range(len(reader)):
        sample = reader.read(index)
        facts = json.loads(sample.get("json", b"{}"))
        widths.append(facts.get("width", 0))
        heights.append(facts.get("height", 0))
        if facts.get("label") is not None:
            labels[facts["label"]] += 1
        boxes += len(facts.get("boxes", []))
        masks += len(facts.get("masks", []))
        semantic += "mask.png" in sample
        if progress is not None:
            progress()
    return SplitFacts(
        samples=len(reader),
        bytes=sum(shard.bytes for shard in split.shards),
        shards=len(split.shards),
        widths=(min(widths, default=0), max(widths, default=0)),
        heights=(min(heights, default=0), max(heights, default=0)),
        labels=labels,
        boxes=boxes,
        masks=masks,
        semantic=semantic,
    )


def contact_sheet(root: Path, manifest: Manifest, split: str, columns: int = 8, rows: int = 5) -> Image.Image:
    """A picture of samples spread over a split: class name below, boxes and tinted masks on the image."""
    reader = ShardReader(root, manifest.split(split))
    count = min(columns * rows, len(reader))
    sheet = Image.new("RGB", (columns * TILE, -(-count // columns) * (TILE + CAPTION)), "#1b1b1b")
    for number in range(count):
        tile = _tile(reader.read(number * len(reader) // count), manifest.classes)
        sheet.paste(tile, ((number % columns) * TILE, (number // columns) * (TILE + CAPTION)))
    return sheet


def write_contact_sheet(root: Path, manifest: Manifest, split: str, path: Path) -> None:
    """Write `contact_sheet` as a PNG.

    Raises:
        DataError: `path` cannot be written.
    """
    try:
        contact_sheet(root, manifest, split).save(path, format="PNG")
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror or error}); name another --sheet") from error


def _tile(sample: dict[str, Any], classes: tuple[str, ...]) -> Image.Image:
    data = next(sample[extension] for extension in IMAGE_EXTENSIONS if extension in sample)
    pixels = decode_image(data)
    facts = json.loads(sample.get("json", b"{}"))
    labels = facts.get("labels", [])
    for mask, label in zip(facts.get("masks", []), labels, strict=False):
        _tint(pixels, rle.decode(mask).astype(bool), COLOURS[label % len(COLOURS)])
    image = Image.fromarray(pixels)
    scale = (TILE - 2 * MARGIN) / max(image.size)
    image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    tile = Image.new("RGB", (TILE, TILE + CAPTION), "#1b1b1b")
    tile.paste(image, (MARGIN, MARGIN))
    draw = ImageDraw.Draw(tile)
    for box, label in zip(facts.get("boxes", []), labels, strict=False):
        outline = COLOURS[label % len(COLOURS)]
        corner = [MARGIN + value * scale for value in box]
        draw.rectangle(corner, outline=outline)
        if corner[2] - corner[0] >= MIN_NAMED:
            draw.text(
                (corner[0] + 2, corner[1]),
                _short(classes, label, 10),
                fill="white",
                stroke_width=1,
                stroke_fill="black",
            )
    if facts.get("label") is not None:
        draw.text((4, TILE), _short(classes, facts["label"], 24), fill="white")
    return tile


def _short(classes: tuple[str, ...], label: int, length: int) -> str:
    name = classes[label] if 0 <= label < len(classes) else f"label {label}?"
    return name.split(",")[0][:length]


def _tint(pixels: np.ndarray, mask: np.ndarray, colour: str) -> None:
    red, green, blue = bytes.fromhex(colour[1:])
    pixels[mask] = (0.88 * pixels[mask] + 0.12 * np.array([red, green, blue])).astype(np.uint8)
