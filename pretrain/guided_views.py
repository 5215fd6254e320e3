"""From a batch of canvases to the views of a step, on the device: heatmap, box, guided crops, augmentation.

The heatmap shows where the momentum encoder responds; crops are drawn inside its extent so that two views of an
image share what it shows (DICM, "semantic-guided SSL"; Peng et al. 2022, ContrastiveCrop). Everything is a pure
function of the batch, the encoder and the state of one generator.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.views import ViewConfig, normalize, random_crops, resample, two_views
from pretrain.codec.precision import autocast
from pretrain.config import PretrainConfig
from pretrain.ssl.encoder import Encoder
from pretrain.ssl.heatmap import heatmap_boxes, heatmaps


class Guidance(NamedTuple):
    """What guided a batch: heatmaps (N, h, w) in 0..1 and boxes (N, 4), xyxy in 0..1 of the canvas."""

    heat: Tensor
    boxes: Tensor


class GuidedViews:
    """Makes the views of a step; `generator` lives on the device and is seeded by the caller at every step."""

    def __init__(self, config: PretrainConfig, encoder: Encoder, generator: torch.Generator):
        self.config, self.encoder, self.generator = config, encoder, generator

    def guidance(self, canvas: Tensor) -> Guidance:
        """Heatmaps and boxes of whole canvases (N, 3, S, S) uint8, at the heatmap's own low resolution."""
        options = self.config.ssl.heatmap
        images = canvas.float().div_(255)
        if options.size != canvas.shape[-1]:
            images = F.interpolate(images, size=(options.size, options.size), mode="area")
        with autocast(canvas.device, self.config.precision):
            heat = heatmaps(self.encoder, self._layout(normalize(images)), options.method, options.layer)
        return Guidance(heat, heatmap_boxes(heat, options.threshold))

    def pair(self, canvas: Tensor, aspect: Tensor, size: int, guided: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Two augmented, normalised views (N, 3, size, size) and their crops (N, 2, 4)."""
        boxes = self.guidance(canvas).boxes if guided else None
        view0, view1, crops = two_views(canvas, aspect, size, self.config.views, self.generator, boxes)
        return self._layout(view0), self._layout(view1), crops

    def natural(self, canvas: Tensor, aspect: Tensor, size: int) -> Tensor:
        """One normalised crop (N, 3, size, size) with its true colours: what the codec will meet."""
        crops = random_crops(aspect, ViewConfig(scale_min=0.5), self.generator)
        return self._layout(normalize(resample(canvas, crops, size)))

    def _layout(self, images: Tensor) -> Tensor:
        if self.config.channels_last:
            return images.contiguous(memory_format=torch.channels_last)
        return images
