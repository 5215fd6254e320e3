"""Metrics of found objects."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics.detection import MeanAveragePrecision

from data_pipeline.sources.annotations import decode_mask, encode_mask
from downstream.evaluation.objects import average_precision, coco_metrics, voc_ap50

SIDE = 100


def outline(box: list[float]) -> dict[str, Any]:
    mask = np.zeros((SIDE, SIDE), np.uint8)
    left, top, right, bottom = (round(value) for value in box)
    mask[top:bottom, left:right] = 1
    return encode_mask(mask)


def record(truth: list[tuple], found: list[tuple], image: int = 0) -> dict[str, Any]:
    """truth: (box, label, ignored); found: (box, label, score)."""
    return {
        "image": image, "height": SIDE, "width": SIDE,
        "truth": {
            "boxes": [item[0] for item in truth], "labels": [item[1] for item in truth],
            "ignored": [item[2] for item in truth],
            "areas": [(box[2] - box[0]) * (box[3] - box[1]) for box, *_ in truth],
            "masks": [outline(item[0]) for item in truth],
        },
        "found": {
            "boxes": [item[0] for item in found], "labels": [item[1] for item in found],
            "scores": [item[2] for item in found], "masks": [outline(item[0]) for item in found],
        },
    }  # fmt: skip


A, B, C = [10.0, 10.0, 50.0, 50.0], [60.0, 60.0, 90.0, 90.0], [0.0, 70.0, 30.0, 95.0]


def test_metrics__what_is_found_exactly_is_perfect():
    records = [record([(A, 0, False), (B, 1, False)], [(A, 0, 0.9), (B, 1, 0.8)])]
    for masks in (False, True):
        metrics = coco_metrics(records, 2, masks)
        assert metrics["map"] == pytest.approx(1) and metrics["map_50"] == pytest.approx(1)
        assert metrics["map_large"] is None  # no object is that large
        assert metrics["map_medium"] == pytest.approx(1)
    assert voc_ap50(records, 2) == voc_ap50(records, 2, eleven_points=True) == 1


def test_metrics__nothing_found_is_nought_and_nothing_to_find_is_none():
    assert coco_metrics([record([(A, 0, False)], [])], 2)["map"] == 0
    assert voc_ap50([record([(A, 0, False)], [])], 2) == 0
    assert coco_metrics([record([], [(A, 0, 0.9)])], 2)["map"] is None
    assert voc_ap50([record([], [(A, 0, 0.9)])], 2) is None


def test_metrics__an_ignored_object_counts_neither_way():
    """Crowds and difficult objects: found or not, the others decide."""
    plain = [record([(A, 0, False)], [(A, 0, 0.5)])]
    for extra in ([], [(B, 0, 0.9)]):
        records = [record([(A, 0, False), (B, 0, True)], [(A, 0, 0.5), *extra])]
        assert coco_metrics(records, 1) == coco_metrics(plain, 1)
        assert voc_ap50(records, 1) == voc_ap50(plain, 1) == 1
    crowd = [0.0, 0.0, 100.0, 100.0]
    inside = [record([(A, 0, False), (crowd, 0, True)], [(A, 0, 0.5), (B, 0, 0.9), (C, 0, 0.8)])]
    assert coco_metrics(inside, 1)["map"] == pytest.approx(1)  # COCO: what lies inside a crowd matches it


def test_voc_ap50__a_second_guess_at_an_object_is_wrong():
    near = [11.0, 10.0, 51.0, 50.0]
    records = [record([(A, 0, False), (B, 0, False)], [(A, 0, 0.9), (near, 0, 0.8), (B, 0, 0.7)])]
    # Recall 1/2, 1/2, 1 at precision 1, 1/2, 2/3.
    assert voc_ap50(records, 1) == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert voc_ap50(records, 1, eleven_points=True) == pytest.approx((6 * 1 + 5 * 2 / 3) / 11)


def test_voc_ap50__guesses_are_ranked_over_all_images():
    records = [record([(A, 0, False)], [(A, 0, 0.3)], 0), record([(A, 0, False)], [(C, 0, 0.6), (A, 0, 0.9)], 1)]
    assert voc_ap50(records, 1) == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)


@given(st.lists(st.booleans(), max_size=30), st.integers(1, 20))
def test_average_precision__lies_in_0_to_1_and_wrong_guesses_at_the_end_change_nothing(hits: list[bool], extra: int):
    def rule(values: list[bool], eleven: bool) -> float:
        correct = np.cumsum(values) if values else np.zeros(0)
        return average_precision(correct / 30, correct / np.arange(1, len(values) + 1), eleven)

    for eleven in (False, True):
        assert 0 <= rule(hits, eleven) <= 1
        assert rule(hits + [False] * extra, eleven) == pytest.approx(rule(hits, eleven))


def test_coco_metrics__as_torchmetrics_has_them():
    """The same pycocotools, fed by others, from random boxes."""
    random = np.random.default_rng(0)

    def box() -> list[float]:
        left, top = random.uniform(0, 60, 2)
        return [left, top, left + random.uniform(8, 40), top + random.uniform(8, 40)]

    records = []
    for image in range(12):
        truth = [(box(), int(random.integers(3)), bool(random.random() < 0.2)) for _ in range(4)]
        found = [([side + random.normal(0, 2) for side in item[0]], item[1], float(random.random())) for item in truth]
        records.append(record(truth, [*found, (box(), 0, float(random.random()))], image))
    for masks in (False, True):
        metric = MeanAveragePrecision(iou_type="segm" if masks else "bbox", backend="pycocotools")
        for item in records:
            truth, found = item["truth"], item["found"]
            metric.update(
                [{"labels": torch.tensor(found["labels"]), "scores": torch.tensor(found["scores"]), **shapes(found)}],
                [{"labels": torch.tensor(truth["labels"]), "iscrowd": torch.tensor(truth["ignored"]).int(),
                  "area": torch.tensor(truth["areas"]), **shapes(truth)}],
            )  # fmt: skip
        theirs, ours = metric.compute(), coco_metrics(records, 3, masks)
        for name, value in ours.items():
            assert (-1 if value is None else value) == pytest.approx(float(theirs[name]), abs=1e-3), name


def shapes(side: dict[str, Any]) -> dict[str, torch.Tensor]:
    masks = np.stack([decode_mask(mask, SIDE, SIDE) for mask in side["masks"]])
    return {"boxes": torch.tensor(side["boxes"]).reshape(-1, 4), "masks": torch.from_numpy(masks).bool()}
