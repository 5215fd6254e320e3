"""Instance segmentation: Mask R-CNN on f3, measured by COCO's mean average precision of masks, and of boxes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from downstream.evaluation.objects import coco_metrics
from downstream.tasks.detection import Detection, DetectionConfig


@dataclass
class InstanceSegmentationConfig(DetectionConfig):
    """Options of an instance segmentation: those of a detection."""

    task: str = "instance_segmentation"


class InstanceSegmentation(Detection):
    """Masks, boxes and classes of objects."""

    Config = InstanceSegmentationConfig
    metrics = {  # noqa: RUF012
        "mask_map": "mask mAP", "mask_map_50": "mask AP50", "mask_map_75": "mask AP75", "mask_map_small": "small",
        "mask_map_medium": "medium", "mask_map_large": "large", "map": "box mAP", "map_50": "box AP50",
    }  # fmt: skip
    masks = True
    remedy = "build it with `dicm data build coco SRC OUT`"

    def measure(self, records: list[dict[str, Any]]) -> dict[str, Any]:
        """Metrics of boxes, and of masks as `mask_...`."""
        outlined = coco_metrics(records, len(self.config.classes), masks=True)
        return {**super().measure(records), **{f"mask_{name}": value for name, value in outlined.items()}}
