"""How well objects are found: COCO's mean average precision, by pycocotools, and VOC's average precision.

Both take records, one an image, of plain values, so that they travel between ranks as they are:

    {"image": 7, "height": 480, "width": 640,
     "truth": {"boxes", "labels", "ignored", "areas" [, "masks"]},
     "found": {"boxes", "labels", "scores" [, "masks"]}}

Boxes are [x0, y0, x1, y1] in pixels, half-open, masks COCO RLE. What is `ignored` is a crowd to COCO and difficult to
VOC: finding it counts neither for nor against.

Sources: pycocotools; the development kit of VOC 2007 and 2012 (Everingham et al. 2010).
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from contextlib import redirect_stdout
from typing import Any

import numpy as np
import torch
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchvision.ops import box_iou

Record = dict[str, Any]

# Where COCOeval puts what.
STATS = {"map": 0, "map_50": 1, "map_75": 2, "map_small": 3, "map_medium": 4, "map_large": 5}
VOC_IOU = 0.5
ELEVEN = np.linspace(0, 1, 11)


def coco_metrics(records: Sequence[Record], num_classes: int, masks: bool = False) -> dict[str, float | None]:
    """`map` (IoU 50:95), `map_50`, `map_75` and, by size of the object, `map_small`, `map_medium`, `map_large`.

    In 0..1; None where there is no object to be found.

    Args:
        masks: compare masks instead of boxes.
    """
    truth = _coco(records, num_classes, _truths(records, masks))
    found = _coco(records, num_classes, _detections(records, masks))
    evaluation = COCOeval(truth, found, "segm" if masks else "bbox")
    with redirect_stdout(io.StringIO()):  # it speaks to the terminal
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    stats = {name: float(evaluation.stats[place]) for name, place in STATS.items()}
    return {name: None if value < 0 else value for name, value in stats.items()}


def _coco(records: Sequence[Record], num_classes: int, annotations: Iterable[dict[str, Any]]) -> COCO:
    coco = COCO()
    coco.dataset = {
        "images": [{"id": record["image"], "height": record["height"], "width": record["width"]} for record in records],
        "categories": [{"id": label, "name": str(label)} for label in range(num_classes)],
        # From 1: to COCOeval a match with number 0 is none.
        "annotations": [{"id": number, **one} for number, one in enumerate(annotations, start=1)],
    }
    with redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def _truths(records: Sequence[Record], masks: bool) -> Iterable[dict[str, Any]]:
    for record in records:
        truth = record["truth"]
        for number, (box, label) in enumerate(zip(truth["boxes"], truth["labels"], strict=True)):
            yield {
                **_annotation(record, box, label, truth["masks"][number] if masks else None),
                "area": truth["areas"][number],
                "iscrowd": int(truth["ignored"][number]),
            }


def _detections(records: Sequence[Record], masks: bool) -> Iterable[dict[str, Any]]:
    for record in records:
        found = record["found"]
        for number, (box, label) in enumerate(zip(found["boxes"], found["labels"], strict=True)):
            mask = found["masks"][number] if masks else None
            area = float(rle.area(mask)) if masks else (box[2] - box[0]) * (box[3] - box[1])
            yield {
                **_annotation(record, box, label, mask), "area": area, "iscrowd": 0, "score": found["scores"][number]
            }  # fmt: skip


def _annotation(record: Record, box: list[float], label: int, mask: dict[str, Any] | None) -> dict[str, Any]:
    left, top, right, bottom = box
    shape = {} if mask is None else {"segmentation": mask}
    return {"image_id": record["image"], "category_id": label, "bbox": [left, top, right - left, bottom - top], **shape}


def voc_ap50(records: Sequence[Record], num_classes: int, eleven_points: bool = False) -> float | None:
    """Mean over classes of VOC's average precision at an IoU of 0.5, in 0..1; None where there is nothing to find.

    Args:
        eleven_points: the rule of VOC 2007: mean of the precision at recalls 0, 0.1, ..., 1. Else that since 2010:
            area under the precision made monotonous.
    """
    values = [_class_ap(records, label, eleven_points) for label in range(num_classes)]
    counted = [value for value in values if value is not None]
    return float(np.mean(counted)) if counted else None


def _class_ap(records: Sequence[Record], label: int, eleven_points: bool) -> float | None:
    scores: list[float] = []
    hits: list[bool] = []
    num_objects = 0
    for record in records:
        truth, found = record["truth"], record["found"]
        objects = [number for number, value in enumerate(truth["labels"]) if value == label]
        ignored = [bool(truth["ignored"][number]) for number in objects]
        num_objects += ignored.count(False)
        guesses = [number for number, value in enumerate(found["labels"]) if value == label]
        guesses.sort(key=lambda number: -found["scores"][number])
        overlaps = box_iou(_boxes(found["boxes"], guesses), _boxes(truth["boxes"], objects)).numpy()
        taken: set[int] = set()
        for guess, row in zip(guesses, overlaps, strict=True):
            # As the kit does: only with the object that it overlaps most, even where that one is taken already.
            best = int(row.argmax()) if len(row) else -1
            if best >= 0 and row[best] >= VOC_IOU:
                if ignored[best]:
                    continue
                hits.append(best not in taken)
                taken.add(best)
            else:
                hits.append(False)
            scores.append(found["scores"][guess])
    if not num_objects:
        return None
    order = np.argsort(-np.array(scores), kind="stable")
    correct = np.cumsum(np.array(hits, dtype=bool)[order])
    recall, precision = correct / num_objects, correct / np.arange(1, len(correct) + 1)
    return average_precision(recall, precision, eleven_points)


def average_precision(recall: np.ndarray, precision: np.ndarray, eleven_points: bool) -> float:
    """VOC's average precision of recall (K,), ascending, and precision (K,) after each of K guesses."""
    if eleven_points:
        return float(np.mean([precision[recall >= level].max(initial=0.0) for level in ELEVEN]))
    steps = np.diff(recall, prepend=0.0)
    best_beyond = np.maximum.accumulate(precision[::-1])[::-1]
    return float((steps * best_beyond).sum())


def _boxes(boxes: list[list[float]], numbers: list[int]) -> torch.Tensor:
    return torch.tensor([boxes[number] for number in numbers], dtype=torch.float64).reshape(-1, 4)
