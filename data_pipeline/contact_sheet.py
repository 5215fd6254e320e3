"""A picture of what a data set holds: samples with boxes, instance masks and semantic masks drawn on them."""

from __future__ import annotations

import colorsys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data_pipeline.decoding import decode_image, decode_indexes
from data_pipeline.errors import DataError
from data_pipeline.manifest import Manifest
from data_pipeline.shards import IMAGE_EXTENSIONS, ShardReader, facts_of
from data_pipeline.sources.annotations import decode_mask

COLOURS = (
    "#e6194b", "#3cb44b", "#ffe119", "#4363d8", "#f58231", "#b45cd6", "#46f0f0", "#f032e6", "#bcf60c", "#fabebe",
    "#4fa8e8", "#008080", "#9a6324", "#c8b8ff", "#a01010", "#aaffc3", "#808000", "#ffd8b1", "#2030a0", "#909090",
)  # fmt: skip
PAPER, INK, IGNORED = "#1b1b1b", "#e8e8e8", "#000000"
TILE, GAP = 232, 8  # pixels: longest side of a sample in the sheet, space around it
LINE, CAPTION = 13, 18  # height of letters, of the line below a sample
INSTANCE_TINT, SEMANTIC_TINT, IGNORED_TINT = 0.25, 0.6, 0.7  # share of the class colour in a pixel
IGNORE = 255
FONT = ImageFont.load_default(size=LINE - 1)


def class_colour(number: int) -> tuple[int, int, int]:
    """RGB of class `number`: twenty chosen colours, then hues a golden section apart."""
    if number < len(COLOURS):
        red, green, blue = bytes.fromhex(COLOURS[number][1:])
        return red, green, blue
    hue, value = number * 0.618034 % 1, (1.0, 0.75)[number % 2]
    red, green, blue = (round(255 * channel) for channel in colorsys.hsv_to_rgb(hue, 0.65, value))
    return red, green, blue


def contact_sheet(root: str | Path, manifest: Manifest, split: str, columns: int = 6, rows: int = 5) -> Image.Image:
    """A picture of samples spread over a split.

    A sample shows its boxes with class names and its instance masks outlined and lightly tinted; the line below has
    its label, or its id. Where there is a semantic mask it stands below, over the image, and a legend of the classes
    seen ends the sheet. What is to be ignored is black.
    """
    reader = ShardReader(root, manifest.split(split))
    count = min(columns * rows, len(reader))
    seen: set[int] = set()
    tiles = [_tile(reader.read(number * len(reader) // count), manifest, seen) for number in range(count)]
    lines = [tiles[first : first + columns] for first in range(0, count, columns)]
    parts = [_row(line, columns) for line in lines]
    if seen:
        parts.append(_legend(manifest, sorted(seen), parts[0].width))
    sheet = Image.new("RGB", (parts[0].width, sum(part.height for part in parts)), PAPER)
    top = 0
    for part in parts:
        sheet.paste(part, (0, top))
        top += part.height
    return sheet


def write_contact_sheet(root: str | Path, manifest: Manifest, split: str, path: Path) -> None:
    """Write `contact_sheet` as a PNG.

    Raises:
        DataError: `path` cannot be written.
    """
    try:
        contact_sheet(root, manifest, split).save(path, format="PNG")
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror or error}); name another --sheet") from error


def _row(tiles: list[Image.Image], columns: int) -> Image.Image:
    row = Image.new("RGB", (columns * (TILE + GAP) + GAP, max(tile.height for tile in tiles) + GAP), PAPER)
    for column, tile in enumerate(tiles):
        row.paste(tile, (GAP + column * (TILE + GAP), GAP))
    return row


def _tile(sample: dict[str, Any], manifest: Manifest, seen: set[int]) -> Image.Image:
    data = next(sample[extension] for extension in IMAGE_EXTENSIONS if extension in sample)
    try:
        facts = facts_of(sample)
    except DataError as error:
        raise DataError(f"sample {sample['__key__']}: {error}") from error
    full = Image.fromarray(decode_image(data))
    scale = TILE / max(full.size)
    size = (max(1, round(full.width * scale)), max(1, round(full.height * scale)))
    pixels = np.array(full.resize(size, Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC))
    try:
        masks = [decode_mask(mask, *full.size) for mask in facts.get("masks", [])]
    except DataError as error:
        raise DataError(f"sample {sample['__key__']}: a mask {error}; `dicm data verify` tells more") from error
    pictures = [_draw_objects(pixels.copy(), facts, masks, scale, manifest.classes)]
    if "mask.png" in sample:
        pictures.append(Image.fromarray(_tint_semantic(pixels, sample["mask.png"], manifest, seen)))
    tile = Image.new("RGB", (TILE, len(pictures) * (size[1] + 2) + CAPTION), PAPER)
    for number, picture in enumerate(pictures):
        tile.paste(picture, ((TILE - size[0]) // 2, number * (size[1] + 2)))
    label = facts.get("label")
    caption = facts.get("image_id", "") if label is None else _name(manifest.classes, label)
    text = _fitting(str(caption), TILE - 4)
    ImageDraw.Draw(tile).text((TILE / 2, tile.height - CAPTION / 2), text, fill=INK, font=FONT, anchor="mm")
    return tile


def _draw_objects(
    pixels: np.ndarray, facts: dict[str, Any], masks: list[np.ndarray], scale: float, classes: tuple[str, ...]
) -> Image.Image:
    """Boxes, names and instance masks on the pixels (H, W, 3) of an image resized by `scale`; masks are full size."""
    height, width = pixels.shape[:2]
    labels = facts.get("labels", [])
    for mask, label in zip(masks, labels, strict=False):
        small = cv2.resize(mask, (width, height), interpolation=cv2.INTER_AREA)
        _blend(pixels, small > 0, class_colour(label), INSTANCE_TINT)
        outlines = cv2.findContours(small, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)[0]
        cv2.drawContours(pixels, outlines, -1, class_colour(label), 1)
    image = Image.fromarray(pixels)
    draw = ImageDraw.Draw(image)
    crowds = facts.get("iscrowd", [0] * len(labels))
    # The largest first: what is in front of another is mostly smaller, and keeps its outline.
    boxes = sorted(zip(facts.get("boxes", []), labels, crowds, strict=False), key=lambda item: -_area(item[0]))
    for box, label, _ in boxes:
        left, top, right, bottom = (round(value * scale) for value in box)
        left, top = min(left, width - 1), min(top, height - 1)
        corner = max(left, min(right, width) - 1), max(top, min(bottom, height) - 1)
        draw.rectangle((left, top, *corner), outline=class_colour(label))
    taken: list[tuple[float, float, float, float]] = []
    for box, label, crowd in boxes:
        name = _name(classes, label) + (" (crowd)" if crowd else "")
        left, top = box[0] * scale, box[1] * scale
        plate = (left, top, left + draw.textlength(name, FONT) + 3, top + LINE)
        # A name is shown whole or not at all: in a crowd, stubs of names would cover what they name.
        if plate[2] <= width and plate[3] <= height and not any(_overlap(plate, other) for other in taken):
            taken.append(plate)
            draw.rectangle(plate, fill=class_colour(label))
            draw.text((left + 2, top + LINE / 2 + 1), name, fill=_readable(class_colour(label)), font=FONT, anchor="lm")
    return image


def _overlap(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _tint_semantic(pixels: np.ndarray, data: bytes, manifest: Manifest, seen: set[int]) -> np.ndarray:
    """The pixels (H, W, 3) under the colours of the semantic classes; values go into `seen`. Background stays."""
    mask = Image.fromarray(decode_indexes(data))
    values = np.asarray(mask.resize((pixels.shape[1], pixels.shape[0]), Image.Resampling.NEAREST))
    pixels = pixels.copy()
    for value in map(int, np.unique(values)):
        seen.add(value)
        if value == IGNORE:
            _blend(pixels, values == value, (0, 0, 0), IGNORED_TINT)
        elif _name(manifest.mask_names, value) != "background":
            _blend(pixels, values == value, _semantic_colour(manifest, value), SEMANTIC_TINT)
    return pixels


def _semantic_colour(manifest: Manifest, value: int) -> tuple[int, int, int]:
    """The colour of a mask value; that of the class of the same name, where boxes have it."""
    name = _name(manifest.mask_names, value)
    return class_colour(manifest.classes.index(name) if name in manifest.classes else value)


def _legend(manifest: Manifest, values: list[int], width: int) -> Image.Image:
    """Colours and names of mask values, in lines of `width` pixels."""
    entries = [
        ("ignored", (0, 0, 0)) if value == IGNORE else (name, _semantic_colour(manifest, value))
        for value in values
        if (name := _name(manifest.mask_names, value)) != "background"
    ]
    places, x, y = [], GAP, GAP
    for name, _ in entries:
        length = CAPTION + round(FONT.getlength(name)) + 2 * GAP
        if x + length > width:
            x, y = GAP, y + CAPTION
        places.append((x, y))
        x += length
    legend = Image.new("RGB", (width, y + CAPTION + GAP), PAPER)
    draw = ImageDraw.Draw(legend)
    for (name, colour), (x, y) in zip(entries, places, strict=True):
        draw.rectangle((x, y + 2, x + 12, y + 14), fill=colour, outline=INK)
        draw.text((x + CAPTION, y + 8), name, fill=INK, font=FONT, anchor="lm")
    return legend


def _name(names: tuple[str, ...], number: int) -> str:
    return names[number].split(",")[0] if 0 <= number < len(names) else f"{number}?"


def _fitting(text: str, width: float) -> str:
    """The beginning of a text that fits into `width` pixels."""
    while text and FONT.getlength(text) > width:
        text = text[:-1]
    return text


def _area(box: list[float]) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _readable(colour: tuple[int, int, int]) -> str:
    red, green, blue = colour
    return "black" if 0.3 * red + 0.59 * green + 0.11 * blue > 120 else "white"


def _blend(pixels: np.ndarray, where: np.ndarray, colour: tuple[int, int, int], share: float) -> None:
    pixels[where] = ((1 - share) * pixels[where] + share * np.array(colour)).astype(np.uint8)
