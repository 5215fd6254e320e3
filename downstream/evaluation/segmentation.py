"""How well pixels are classified: mean IoU and accuracy from a confusion of pixels, which adds up over ranks.

Pixels of class 255 in the truth count nowhere. The mean is over the classes that occur, in truth or prediction.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics.classification import MulticlassConfusionMatrix

from data_pipeline.masks import IGNORE


class SegmentationMetric:
    """Confusion of pixels, gathered image by image."""

    def __init__(self, num_classes: int):
        self.matrix = MulticlassConfusionMatrix(num_classes, ignore_index=IGNORE)

    def update(self, predicted: Tensor, masks: Tensor) -> None:
        """Add classes (N, H, W) predicted for masks (N, H, W)."""
        self.matrix.update(predicted.cpu(), masks.cpu().long())

    def confusion(self) -> Tensor:
        """(K, K) float64: pixels of a true class (row) by the class predicted (column)."""
        return self.matrix.confmat.double()


def scores(confusion: Tensor) -> dict[str, float | None]:
    """`miou` and `pixel_accuracy`, 0..1, of a confusion (K, K); None where no pixel counts."""
    hits = confusion.diagonal()
    union = confusion.sum(0) + confusion.sum(1) - hits
    occurs = union > 0
    if not bool(occurs.any()):
        return {"miou": None, "pixel_accuracy": None}
    return {
        "miou": float((hits[occurs] / union[occurs]).mean()),
        "pixel_accuracy": float(hits.sum() / confusion.sum()),
    }


def class_scores(confusion: Tensor) -> list[float | None]:
    """IoU of each class; None for one that does not occur."""
    hits = confusion.diagonal()
    union = confusion.sum(0) + confusion.sum(1) - hits
    return [float(hit / whole) if whole > 0 else None for hit, whole in zip(hits, union, strict=True)]


def constant_scores(confusion: Tensor) -> dict[str, float | None]:
    """What predicting the most frequent class everywhere would score on the truth behind a confusion (K, K)."""
    truth = confusion.sum(1)
    constant = torch.zeros_like(confusion)
    constant[:, truth.argmax()] = truth
    return scores(constant)
