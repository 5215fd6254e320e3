from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_objects import SIZES, rectangles, write_objects

from data_pipeline.errors import DataError
from data_pipeline.manifest import Manifest, Split
from data_pipeline.objects import (
    ObjectDataset,
    facts_from,
    mirror,
    read_objects,
    shrink,
    survey_objects,
)
from data_pipeline.samples import once, training_loader
from data_pipeline.shards import ShardWriter
from data_pipeline.sources.annotations import encode_mask
from data_pipeline.surveys import UnusableError

WIDTH, HEIGHT = 40, 30
WHOLE = encode_mask(np.ones((HEIGHT, WIDTH), np.uint8))


def read(outlined: bool = False, /, **facts: object):
    return read_objects(facts, WIDTH, HEIGHT, num_classes=3, masks=outlined)


def test_read_objects__boxes_are_cut_to_the_image_and_counted():
    objects, left_out = read(boxes=[[-20, 4, 20, 90]], labels=[2])
    assert objects.boxes.tolist() == [[0, 4, 20, 30]]
    assert objects.areas.tolist() == [20 * 26]
    assert left_out == {"box cut to the image": 1}


def test_read_objects__boxes_without_area_and_unknown_classes_are_left_out_with_their_fellows_in_place():
    objects, left_out = read(
        boxes=[[5, 5, 5, 9], [1, 2, 3, 4], [50, 50, 60, 60], [0, 0, 9, 9], [2, 2, 8, 8], [float("nan"), 0, 1, 1]],
        labels=[0, 3, 0, -1, 1, 0],
        iscrowd=[0, 0, 0, 0, 1, 0],
        areas=[1, 2, 3, 4, 5, 6],
    )
    assert objects.boxes.tolist() == [[2, 2, 8, 8]]
    assert objects.labels.tolist() == [1] and objects.ignored.tolist() == [True] and objects.areas.tolist() == [5]
    assert left_out == {"box without area in the image": 3, "object of unknown class": 2}


def test_read_objects__masks_of_another_size_damaged_or_empty_take_their_object_along():
    other, empty = encode_mask(np.ones((9, 9), np.uint8)), encode_mask(np.zeros((HEIGHT, WIDTH), np.uint8))
    damaged = {**WHOLE, "counts": WHOLE["counts"] + "11"}
    boxes = [[0, 0, 9, 9]] * 5
    objects, left_out = read(True, boxes=boxes, labels=[0] * 5, masks=[other, empty, WHOLE, damaged, None])
    assert objects.masks.shape == (1, HEIGHT, WIDTH) and bool(objects.masks.all())
    assert objects.areas.tolist() == [WIDTH * HEIGHT]
    assert left_out == {"object whose mask is damaged or of another size": 3, "object whose mask is empty": 1}


def test_read_objects__an_image_without_objects_is_background():
    objects, left_out = read(True, boxes=[], labels=[])
    assert objects.boxes.shape == (0, 4) and objects.masks.shape == (0, HEIGHT, WIDTH)
    assert left_out == {"image without objects, kept as background": 1}


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({}, "image without boxes"),
        ({"boxes": [[0, 0, 1, 1]], "labels": []}, "more or fewer labels"),
        ({"boxes": [[0, 0, 1, 1]], "labels": [0]}, "without a mask"),
        ({"boxes": [[0, 0, 1, 1]], "labels": [0], "masks": [WHOLE, WHOLE]}, "without a mask"),
    ],
)
def test_read_objects__an_image_that_nobody_annotated_is_not_background(facts: dict, reason: str):
    with pytest.raises(UnusableError, match=reason):
        read(True, **facts)


def test_read_objects__an_image_too_small_for_a_stream():
    with pytest.raises(UnusableError, match="16 pixels"):
        read_objects({"boxes": []}, 15, 40, 3, False)


@pytest.mark.parametrize("facts", [{"boxes": [["a", 0, 1, 1]], "labels": [0]}, {"boxes": [[0, 0, 1]], "labels": [0]},
                                   {"boxes": [[0, 0, 1, 1]], "labels": [None]}, {"boxes": [[0] * 8], "labels": [0]},
                                   {"boxes": [7], "labels": [0]}])  # fmt: skip
def test_read_objects__what_is_no_number_is_said_in_one_line(facts: dict):
    with pytest.raises(DataError, match=r"not numbers.*build it again"):
        read(**facts)


@pytest.mark.parametrize("key", ["boxes", "labels", "masks", "areas", "iscrowd", "difficult"])
@pytest.mark.parametrize("value", [5, {"a": 1}, "xy"])
def test_read_objects__what_is_no_list_is_named(key: str, value: object):
    with pytest.raises(DataError, match=rf"{key} are no list"):
        read(True, **{"boxes": [[0, 0, 9, 9]], "labels": [0], "masks": [WHOLE], key: value})


@pytest.mark.parametrize("key", ["areas", "iscrowd", "difficult"])
def test_read_objects__lists_of_other_lengths_are_named(key: str):
    with pytest.raises(DataError, match=rf"0 {key} for 1 boxes"):
        read(**{"boxes": [[0, 0, 9, 9]], "labels": [0], key: []})


@given(st.lists(st.tuples(*[st.floats(-1e4, 1e4)] * 4, st.integers(-2, 5)), max_size=8))
def test_read_objects__whatever_comes_boxes_have_area_inside_the_image(items: list[tuple]):
    objects, left_out = read(boxes=[item[:4] for item in items], labels=[item[4] for item in items])
    assert bool((objects.boxes[:, :2] < objects.boxes[:, 2:]).all())
    assert bool((objects.boxes >= 0).all()) and bool((objects.boxes <= torch.tensor([WIDTH, HEIGHT] * 2)).all())
    assert bool(((objects.labels >= 0) & (objects.labels < 3)).all())
    dropped = left_out["box without area in the image"] + left_out["object of unknown class"]
    assert len(objects.boxes) + dropped == len(items)


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Nine images; the third was never annotated, the fifth has no masks."""
    samples = copy.deepcopy(rectangles(9))
    del samples[2][1]["boxes"], samples[4][1]["masks"]
    return write_objects(tmp_path / "data", {"train": samples})


def test_survey__says_what_serves_and_counts_the_rest(mixed: Path):
    found = survey_objects(mixed, "train", 3, masks=True)
    assert found.usable.tolist() == [0, 1, 3, 5, 6, 7, 8]
    assert found.found == 7
    assert found.left_out == {"image without boxes": 1, "image without a mask for each box": 1}
    assert survey_objects(mixed, "train", 3, masks=False).usable.tolist() == [0, 1, 3, 4, 5, 6, 7, 8]


def test_training_loader__an_epoch_has_each_usable_sample_once_and_resumes_where_it_was(mixed: Path):
    found = survey_objects(mixed, "train", 3, masks=True)
    dataset = ObjectDataset(mixed, "train", found.usable, 3, True)
    assert dataset.shard_sizes == [7]
    loader = iter(training_loader(dataset, batch_size=2, seed=3))
    seen = [[sample.index for sample in next(loader)] for _ in range(7)]
    assert sorted(index for batch in seen for index in batch) == sorted(found.usable.tolist() * 2)
    again = iter(training_loader(dataset, batch_size=2, seed=3, samples_seen=6))
    assert [[sample.index for sample in next(again)] for _ in range(4)] == seen[3:]


def test_once__ranks_share_the_images_which_keep_their_sizes(mixed: Path):
    dataset = ObjectDataset(mixed, "train", survey_objects(mixed, "train", 3, masks=False).usable, 3, False)
    found = [sample for rank in (0, 1) for sample in once(dataset, rank=rank, world=2)]
    assert sorted(sample.index for sample in found) == [0, 1, 3, 4, 5, 6, 7, 8]
    for sample in found:
        assert sample.image.shape == (3, *reversed(SIZES[sample.index % 3]))


def test_shrink__objects_follow_the_image(mixed: Path):
    dataset = ObjectDataset(mixed, "train", survey_objects(mixed, "train", 3, masks=True).usable, 3, True)
    before = dataset[1]
    after = shrink(before, 40)
    assert before.image.shape == (3, 48, 80) and after.image.shape == (3, 24, 40)
    assert torch.allclose(after.objects.boxes, before.objects.boxes / 2)
    assert after.objects.masks.shape == (1, 24, 40)
    assert abs(float(after.objects.masks.sum()) - float(after.objects.areas[0])) < 0.2 * float(after.objects.areas[0])
    assert shrink(before, 80) is before


def test_dataset__an_image_of_another_size_than_noted_is_named(tmp_path: Path):
    samples = copy.deepcopy(rectangles(2))
    samples[1][1]["width"] = 99
    root = write_objects(tmp_path / "data", {"train": samples})
    dataset = ObjectDataset(root, "train", survey_objects(root, "train", 3, masks=False).usable, 3, False)
    with pytest.raises(DataError, match=r"train-0001.*80 x 48, not 99 x 48"):
        dataset[1]


def test_mirror__boxes_and_masks_go_along(mixed: Path):
    dataset = ObjectDataset(mixed, "train", survey_objects(mixed, "train", 3, masks=True).usable, 3, True)
    sample, mirrored = dataset[1], mirror(dataset[1])
    assert torch.equal(mirrored.objects.masks, sample.objects.masks.flip(-1))
    for one in (sample, mirrored):
        x = one.objects.masks[0].any(dim=0).nonzero().flatten()
        assert [int(x[0]), int(x[-1]) + 1] == one.objects.boxes[0, [0, 2]].tolist()
        # The rectangle's colour is in the box, and nowhere else.
        left, top, right, bottom = one.objects.boxes[0].int().tolist()
        assert bool((one.image[:, top:bottom, left:right].amax(0) == 240).all())
    again = mirror(mirrored)
    assert torch.equal(again.image, sample.image) and torch.equal(again.objects.boxes, sample.objects.boxes)


def test_facts_from__is_read_back(mixed: Path):
    dataset = ObjectDataset(mixed, "train", survey_objects(mixed, "train", 3, masks=True).usable, 3, True)
    for number in range(3):
        sample = dataset[number]
        height, width = sample.image.shape[-2:]
        objects, left_out = read_objects(facts_from(sample.objects, width, height), width, height, 3, masks=True)
        assert not left_out
        for one, other in zip(objects, sample.objects, strict=True):
            assert torch.equal(one, other)


def test_survey_objects__crowds_are_told(tmp_path: Path):
    facts = {"width": 40, "height": 30, "boxes": [[0, 0, 9, 9]] * 2, "labels": [0, 0], "iscrowd": [1, 1]}
    with ShardWriter(tmp_path, "train") as writer:
        writer.write({"__key__": "one", "png": b"", "json": facts})
    Manifest("crowds", ("a",), {"train": Split(tuple(writer.shards))}).save(tmp_path)
    found = survey_objects(tmp_path, "train", 1, masks=False)
    assert found.found == 0 and found.left_out == {"crowd (iscrowd 1), of which nothing is learned": 2}
