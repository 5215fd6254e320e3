"""Predictions drawn on pictures: captions, boxes with names and scores, instance masks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from data_pipeline.contact_sheet import class_colour
from data_pipeline.sources.annotations import decode_mask

LETTERS = 13  # pixels
GAP = 6
CAPTION_WIDTH = 160  # pixels that a picture with a caption has at least
REGION_TINT = 0.6
TINT = 0.45  # share of the class colour in a pixel of a mask


def draw_caption(picture: Tensor, text: str) -> Tensor:
    """The picture (3, H, W) uint8, a small one enlarged, with a line of text in its upper left corner."""
    times = -(-CAPTION_WIDTH // picture.shape[-1])
    picture = picture.repeat_interleave(times, -1).repeat_interleave(times, -2)
    return _with_labels(picture, [(0, 0, text, (0, 0, 0))])


def _with_labels(picture: Tensor, labels: list[tuple[float, float, str, tuple[int, int, int]]]) -> Tensor:
    """The picture with texts on grounds of a colour each, given by the left upper corner, kept inside the picture."""
    image = Image.fromarray(picture.permute(1, 2, 0).numpy())
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=LETTERS)
    for x, y, text, ground in labels:
        width, height = round(font.getlength(text)) + 4, LETTERS + 3
        left, top = max(0, min(round(x), image.width - width)), max(0, min(round(y), image.height - height))
        draw.rectangle((left, top, left + width, top + height), fill=ground)
        red, green, blue = ground
        ink = "black" if 0.3 * red + 0.59 * green + 0.11 * blue > 140 else "white"
        draw.text((left + 2, top), text, fill=ink, font=font)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def draw_regions(picture: Tensor, regions: list[dict[str, Any]]) -> Tensor:
    """The picture (3, H, W) uint8 in the colours of its classes, over a legend of those that occur.

    Args:
        regions: `class`, `label`, `share` of the pixels and `mask` (COCO RLE).
    """
    height, width = picture.shape[1:]
    masks = torch.from_numpy(np.stack([decode_mask(item["mask"], width, height) for item in regions])).bool()
    colours = [class_colour(item["label"]) for item in regions]
    tinted = draw_segmentation_masks(picture, masks, alpha=REGION_TINT, colors=colours)
    font, entries = ImageFont.load_default(size=LETTERS), []
    texts = [f"{item['class']} {100 * item['share']:.0f} %" for item in regions]
    width = max(width, *(LETTERS + 3 * GAP + round(font.getlength(text)) for text in texts))
    tinted = F.pad(tinted, (0, width - tinted.shape[-1]), value=255)
    left = top = GAP
    for item, colour in sorted(zip(regions, colours, strict=True), key=lambda entry: -entry[0]["share"]):
        text = f"{item['class']} {100 * item['share']:.0f} %"
        taken = LETTERS + GAP + round(font.getlength(text))
        if left > GAP and left + taken > width - GAP:
            left, top = GAP, top + LETTERS + GAP
        entries.append((left, top, colour, text))
        left += taken + 2 * GAP
    legend = Image.new("RGB", (width, top + LETTERS + GAP), "white")
    draw = ImageDraw.Draw(legend)
    for left, top, colour, text in entries:
        draw.rectangle((left, top, left + LETTERS - 2, top + LETTERS - 2), fill=colour)
        draw.text((left + LETTERS + GAP // 2, top - 1), text, fill="black", font=font)
    return torch.cat([tinted, torch.from_numpy(np.array(legend)).permute(2, 0, 1)], dim=1)


def draw_objects(picture: Tensor, objects: list[dict[str, Any]], score: float) -> Tensor:
    """The picture (3, H, W) uint8 with boxes, names, scores and masks of the objects that are surer than `score`.

    Args:
        objects: `class`, `label`, `score`, `box` in pixels of the picture, and `mask` (COCO RLE) where there is one.
    """
    # The surest last, so that it is drawn on top.
    shown = sorted((item for item in objects if item["score"] >= score), key=lambda item: item["score"])
    if not shown:
        return picture
    height, width = picture.shape[1:]
    colours = [class_colour(item["label"]) for item in shown]
    if all("mask" in item for item in shown):
        masks = torch.from_numpy(np.stack([decode_mask(item["mask"], width, height) for item in shown])).bool()
        picture = draw_segmentation_masks(picture, masks, alpha=TINT, colors=colours)
    boxes = torch.tensor([item["box"] for item in shown])
    picture = draw_bounding_boxes(picture, boxes, None, colours, width=2 if min(height, width) > 160 else 1)
    return _with_labels(
        picture,
        [
            (item["box"][0], item["box"][1] - LETTERS - 3, f"{item['class']} {item['score']:.2f}", colour)
            for item, colour in zip(shown, colours, strict=True)
        ],
    )
