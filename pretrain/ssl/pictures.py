"""Pictures of what guides the crops, for TensorBoard and reports."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.utils import draw_bounding_boxes

MIN_SIDE = 160  # pixels of an image in the picture, at least
GAP = 6
GAP_SHADE = 40  # dark, so that a box at the border shows
BOX_COLOUR = (255, 255, 255)
CROP_COLOURS = ((0, 230, 118), (255, 64, 200))


def guidance_picture(canvas: Tensor, heat: Tensor, boxes: Tensor, crops: Tensor) -> Tensor:
    """(3, H, W) uint8: a column an image; above, it with its box (white) and its two crops (green, magenta);
    below, the heatmap over it and the box.

    Args:
        canvas: (N, 3, S, S) uint8.
        heat: (N, h, w) in 0..1.
        boxes: (N, 4), xyxy in 0..1.
        crops: (N, 2, 4), xyxy in 0..1.
    """
    # On first use: it brings in scikit-learn and matplotlib.
    from pytorch_grad_cam.utils.image import show_cam_on_image

    scale = max(1, math.ceil(MIN_SIDE / canvas.shape[-1]))
    side = canvas.shape[-1] * scale
    images = _resize(canvas.float() / 255, side)
    heats = _resize(heat.float().unsqueeze(1), side).squeeze(1)
    columns = []
    for image, warmth, box, pair in zip(images, heats, boxes.float(), crops.float(), strict=True):
        overlay = show_cam_on_image(image.permute(1, 2, 0).numpy(), warmth.numpy(), use_rgb=True, image_weight=0.55)
        plain = (image * 255).round().to(torch.uint8)
        above = _draw(plain, torch.cat([box[None], pair]), [BOX_COLOUR, *CROP_COLOURS])
        below = _draw(torch.from_numpy(overlay).permute(2, 0, 1), box[None], [BOX_COLOUR])
        columns.append(torch.cat([F.pad(above, (0, 0, 0, GAP), value=GAP_SHADE), below], dim=1))
    row = torch.cat([F.pad(column, (0, GAP), value=GAP_SHADE) for column in columns], dim=2)
    return row[:, :, :-GAP].contiguous()


def _resize(images: Tensor, side: int) -> Tensor:
    return F.interpolate(images, size=(side, side), mode="bilinear", align_corners=False).clamp(0, 1)


def _draw(image: Tensor, boxes: Tensor, colours: list[tuple[int, int, int]]) -> Tensor:
    side = image.shape[-1]
    pixels = (boxes * side).round()
    pixels[:, 2:] = torch.maximum(pixels[:, 2:], pixels[:, :2] + 1)
    return draw_bounding_boxes(image, pixels.clamp(0, side - 1), colors=colours, width=max(2, side // 80))
