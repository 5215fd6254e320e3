"""What is in a data set: counts, sizes, classes, and a contact sheet of its images."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from data_pipeline.loader import decode_image
from data_pipeline.shards import IMAGE_EXTENSIONS, Manifest, ShardReader, Split

COLOURS = ("#e6194b", "#3cb44b", "#ffe119", "#4363d8", "#f58231", "#911eb4", "#46f0f0", "#f032e6", "#bcf60c", "#fabebe")
TILE, CAPTION = 160, 16


@dataclass(frozen=True)
class SplitFacts:
    """Counts of one split, from its samples' JSON."""

    samples: int
    bytes: int
    shards: int
    widths: tuple[int, int]  # least and greatest, pixels
    heights: tuple[int, int]
    classes: dict[str, int]
    boxes: int
    masks: int


def split_facts(root: Path, manifest: Manifest, name: str) -> SplitFacts:
    """Read through a split and count."""
    split = manifest.split(name)
    reader = ShardReader(root, split)
    widths, heights, labels, boxes, masks = [], [], Counter[str](), 0, 0
    for index in range(len(reader)):
        facts = json.loads(reader.read(index).get("json", b"{}"))
        widths.append(facts.get("width", 0))
        heights.append(facts.get("height", 0))
        if facts.get("label") is not None:
            labels[manifest.classes[facts["label"]]] += 1
        boxes += len(facts.get("boxes", []))
        masks += len(facts.get("masks", []))
    return SplitFacts(
        samples=len(reader),
        bytes=sum(shard.bytes for shard in split.shards),
        shards=len(split.shards),
        widths=(min(widths), max(widths)),
        heights=(min(heights), max(heights)),
        classes=dict(sorted(labels.items(), key=lambda item: -item[1])),
        boxes=boxes,
        masks=masks,
    )


def contact_sheet(root: Path, manifest: Manifest, split: Split, columns: int = 8, rows: int = 5) -> Image.Image:
    """A picture of samples spread over the split, with class names and boxes."""
    reader = ShardReader(root, split)
    count = min(columns * rows, len(reader))
    rows = -(-count // columns)
    sheet = Image.new("RGB", (columns * TILE, rows * (TILE + CAPTION)), "#1b1b1b")
    for number in range(count):
        sample: dict[str, Any] = reader.read(number * len(reader) // count)
        tile = _tile(sample, manifest.classes)
        sheet.paste(tile, ((number % columns) * TILE, (number // columns) * (TILE + CAPTION)))
    return sheet


def _tile(sample: dict[str, bytes], classes: tuple[str, ...]) -> Image.Image:
    data = next(sample[extension] for extension in IMAGE_EXTENSIONS if extension in sample)
    pixels: np.ndarray = decode_image(data)
    facts = json.loads(sample.get("json", b"{}"))
    scale = (TILE - 4) / max(pixels.shape[:2])
    image = Image.fromarray(pixels)
    image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    tile = Image.new("RGB", (TILE, TILE + CAPTION), "#1b1b1b")
    tile.paste(image, (2, 2))
    draw = ImageDraw.Draw(tile)
    for box, label in zip(facts.get("boxes", []), facts.get("labels", []), strict=False):
        draw.rectangle([2 + value * scale for value in box], outline=COLOURS[label % len(COLOURS)])
    if facts.get("label") is not None:
        draw.text((4, TILE), classes[facts["label"]].split(",")[0][:24], fill="white")
    return tile
