"""Predictions drawn on pictures: captions, boxes with names and scores, instance masks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from data_pipeline.contact_sheet import class_colour
from data_pipeline.sources.annotations import decode_mask

LETTERS = 13  # pixels
TINT = 0.45  # share of the class colour in a pixel of a mask


def draw_caption(picture: Tensor, text: str) -> Tensor:
    """The picture (3, H, W) uint8 with a line of text in its upper left corner."""
    image = Image.fromarray(picture.permute(1, 2, 0).numpy())
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=LETTERS)
    left, top, right, bottom = draw.textbbox((3, 2), text, font=font)
    draw.rectangle((left - 3, top - 2, right + 3, bottom + 2), fill="black")
    draw.text((3, 2), text, fill="white", font=font)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


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
    return draw_bounding_boxes(
        picture,
        torch.tensor([item["box"] for item in shown]),
        [f"{item['class']} {item['score']:.2f}" for item in shown],
        colours,
        width=2 if min(height, width) > 160 else 1,
    )
