"""Faster and Mask R-CNN on features of the codec: torchvision's parts, without its way from pixels to features.

    f3 (H/4) = C2 -> layer2 = C3 -> layer3 = C4 -> layer4 = C5      the backbone's tail, a copy
        \\-----------\\---------------\\--------------\\-> FPN -> P2..P5, P6 -> proposals -> boxes, classes [, masks]

Images keep their sizes. Their features are padded at the right and the bottom to one size that all strides divide,
as torchvision pads images; boxes and anchors are in pixels of the images.

Sources: Faster R-CNN (Ren et al. 2015), FPN (Lin et al. 2017), Mask R-CNN (He et al. 2017), as torchvision has them.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from downstream.grouping import pad_features
from downstream.latents import Received
from downstream.tasks.latent_input import LatentInput, feature_distance
from pretrain.codec.backbone import HEAD_STRIDE, Backbone

NUM_LEVELS = 5  # P2 to P6
LEVELS = ("c2", "c3", "c4", "c5")
COARSEST = HEAD_STRIDE * 2 ** (NUM_LEVELS - 1)  # pixels between neighbouring cells of P6
RATIOS = (0.5, 1.0, 2.0)  # height over width of anchors


class Pyramid(nn.Module):
    """P2..P6, each (N, channels, H/4..H/64, W/4..W/64), of features (N, C1, H/4, W/4)."""

    def __init__(self, backbone: Backbone, channels: int):
        super().__init__()
        self.tail = nn.ModuleList(copy.deepcopy(getattr(backbone, f"layer{i}")) for i in (2, 3, 4))
        widths = (backbone.channels, *backbone.tail_channels)
        # Without affine parameters: they bring features of any codec to one scale, so one learning rate fits all.
        self.norms = nn.ModuleList(nn.BatchNorm2d(width, affine=False) for width in widths)
        self.fpn = FeaturePyramidNetwork(list(widths), channels, LastLevelMaxPool())
        self.out_channels = channels

    def forward(self, features: Tensor) -> OrderedDict[str, Tensor]:
        levels = [features]
        for layer in self.tail:
            levels.append(layer(levels[-1]))
        return self.fpn(
            OrderedDict((name, norm(level)) for name, norm, level in zip(LEVELS, self.norms, levels, strict=True))
        )


class Detector(nn.Module):
    """Faster R-CNN on features, or Mask R-CNN.

    Batch norms keep their statistics in training: batches are few images, with padding between them.

    Args:
        num_classes: without the background.
        channels: of the pyramid and the mask head.
        hidden: width of the box head.
        anchors: side in pixels of the anchors of P2 to P6.
        proposals: that are left for the box head.
        rois: of these, how many an image are trained on.
        masks: predict masks as well.
    """

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        *,
        channels: int,
        hidden: int,
        anchors: Sequence[int],
        proposals: int,
        rois: int,
        masks: bool,
    ):
        super().__init__()
        pyramid = Pyramid(backbone, channels)
        options: dict[str, Any] = {
            "rpn_anchor_generator": AnchorGenerator(tuple((side,) for side in anchors), (RATIOS,) * NUM_LEVELS),
            "rpn_pre_nms_top_n_train": 2 * proposals, "rpn_pre_nms_top_n_test": proposals,
            "rpn_post_nms_top_n_train": proposals, "rpn_post_nms_top_n_test": proposals,
            "box_roi_pool": _roi_pool(7), "box_head": TwoMLPHead(channels * 7**2, hidden),
            "box_predictor": FastRCNNPredictor(hidden, num_classes + 1), "box_batch_size_per_image": rois,
        }  # fmt: skip
        if masks:
            options |= {
                "mask_roi_pool": _roi_pool(14), "mask_head": MaskRCNNHeads(channels, (channels,) * 4, 1),
                "mask_predictor": MaskRCNNPredictor(channels, channels, num_classes + 1),
            }  # fmt: skip
        whole = (MaskRCNN if masks else FasterRCNN)(pyramid, **options)
        self.pyramid, self.rpn, self.roi_heads = pyramid, whole.rpn, whole.roi_heads

    def train(self, mode: bool = True) -> Detector:
        """Training mode of all but the batch norms."""
        super().train(mode)
        for module in self.pyramid.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def forward(
        self, features: Sequence[Tensor], sizes: list[tuple[int, int]], targets: list[dict[str, Tensor]] | None = None
    ) -> Any:
        """Losses in training; else detections of each image.

        Args:
            features: (C1, ceil(H/4), ceil(W/4)) of each image.
            sizes: (H, W) of each image in pixels.
            targets: `boxes` (K, 4) in pixels, `labels` (K,) from 0 and, for masks, `masks` (K, H, W) of each image.

        Returns:
            In training, losses by name. Else for each image `boxes` (K, 4), `labels` (K,) from 0, `scores` (K,) and,
            for masks, `masks` (K, H, W) bool.
        """
        batch = pad_features(features, COARSEST // HEAD_STRIDE)
        pyramid = self.pyramid(batch)
        # Boxes are computed in float32: bfloat16 has no pixels beyond 256.
        with torch.autocast(batch.device.type, enabled=False):
            levels = OrderedDict((name, level.float()) for name, level in pyramid.items())
            return self._heads(levels, batch, sizes, targets)

    def _heads(
        self,
        levels: OrderedDict[str, Tensor],
        batch: Tensor,
        sizes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None,
    ) -> Any:
        height, width = (HEAD_STRIDE * side for side in batch.shape[-2:])
        # Anchors only ask how large the padded images are: no pixel stands behind this view of one number.
        images = ImageList(batch.new_zeros(()).expand(len(batch), 3, height, width), sizes)
        if targets is not None:
            targets = [{**target, "labels": target["labels"] + 1} for target in targets]  # 0 is the background
        proposals, proposal_losses = self.rpn(images, levels, targets)
        detections, losses = self.roi_heads(levels, proposals, sizes, targets)
        if self.training:
            return {**proposal_losses, **losses}
        for detection, size in zip(detections, sizes, strict=True):
            detection["labels"] = detection["labels"] - 1
            if "masks" in detection:
                pasted = paste_masks_in_image(detection["masks"], detection["boxes"], size)
                detection["masks"] = pasted[:, 0] > 0.5
        return detections


class GatedDetector(nn.Module):
    """A detector on gated latents: gate and transform give it what it reads as C2."""

    def __init__(self, front: LatentInput, detector: Detector):
        super().__init__()
        self.front, self.detector = front, detector

    def forward(
        self,
        y_hats: Sequence[Tensor],
        sizes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]],
        guides: Sequence[Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Losses of images by name, with `feature_mse` where there are guides.

        Args:
            y_hats: latents (C, h, w) of each image.
            sizes, targets: as for `Detector`.
            guides: (C1, ceil(H/4), ceil(W/4)) of each image, which F is compared with.
        """
        features = self.front.of_many(y_hats, sizes)
        losses: dict[str, Tensor] = self.detector(features, sizes, targets)
        if guides is None:
            return losses
        distances = [feature_distance(one, guide) for one, guide in zip(features, guides, strict=True)]
        return {**losses, "feature_mse": torch.stack(distances).mean()}

    def from_base(self, received: Received) -> dict[str, Tensor]:
        """Detections, as `Detector` gives them, of what a stream's base gave."""
        features = self.front.from_base(received)
        (found,) = self.detector(list(features), [(received.height, received.width)])
        return found


def _roi_pool(side: int) -> MultiScaleRoIAlign:
    """Regions as (side, side) of P2..P5, each read at its level's stride."""
    pool = MultiScaleRoIAlign(list(LEVELS), side, sampling_ratio=2)
    # The scales of levels are guessed from the first images that are seen, where padding can mislead it; here are some
    # without any.
    levels = OrderedDict((name, torch.zeros(1, 1, 64 >> i, 64 >> i)) for i, name in enumerate(LEVELS))
    pool(levels, [torch.tensor([[0.0, 0.0, 8.0, 8.0]])], [(64 * HEAD_STRIDE, 64 * HEAD_STRIDE)])
    return pool
