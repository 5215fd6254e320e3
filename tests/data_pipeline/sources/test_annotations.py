from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as rle

from data_pipeline.sources.annotations import (
    OtherSizeError,
    OutlineError,
    check_mask,
    clean_boxes,
    encode_mask,
    outline_mask,
)

SIDES = st.integers(1, 50)
CORNER = st.floats(-60, 60) | st.just(float("nan")) | st.just(float("inf")) | st.integers(-3, 53)
BOXES = st.lists(st.tuples(CORNER, CORNER, CORNER, CORNER), max_size=6)


@given(BOXES, SIDES, SIDES)
def test_clean_boxes__what_is_kept_lies_inside_and_nothing_is_lost_without_a_word(boxes: list, width: int, height: int):
    clean = clean_boxes(boxes, width, height)
    assert sorted(clean.kept + clean.dropped) == list(range(len(boxes)))
    assert len(clean.boxes) == len(clean.kept) >= clean.num_clipped
    for left, top, right, bottom in clean.boxes:
        assert 0 <= left < right <= width and 0 <= top < bottom <= height


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(10, 20), st.integers(10, 20)), max_size=5))
def test_clean_boxes__boxes_inside_the_image_stay_as_they_are(boxes: list):
    clean = clean_boxes(boxes, 20, 20)
    assert clean.boxes == [list(box) for box in boxes]
    assert clean.dropped == [] and clean.num_clipped == 0


@given(BOXES, SIDES, SIDES)
def test_clean_boxes__cleaning_again_changes_nothing(boxes: list, width: int, height: int):
    once = clean_boxes(boxes, width, height).boxes
    again = clean_boxes(once, width, height)
    assert again.boxes == once and again.dropped == [] and again.num_clipped == 0


MASKS = st.integers(0, 2**32 - 1).map(lambda seed: np.random.default_rng(seed)).map(
    lambda random: (random.random(tuple(random.integers(1, 20, 2))) < random.random()).astype(np.uint8)
)  # fmt: skip


@given(MASKS)
def test_encode_mask__comes_back_and_passes_the_check(mask: np.ndarray):
    code = encode_mask(mask)
    assert np.array_equal(rle.decode(code), mask)
    check_mask(code, mask.shape[1], mask.shape[0])


@given(MASKS, st.data())
def test_check_mask__a_code_that_was_cut_or_changed_is_found_or_reads_as_a_whole_mask(
    mask: np.ndarray, data: st.DataObject
):
    code = encode_mask(mask)
    counts = code["counts"]
    place = data.draw(st.integers(0, len(counts) - 1))
    letter = data.draw(st.characters(min_codepoint=48, max_codepoint=111))
    for changed in (counts[:place], counts[:place] + letter + counts[place + 1 :]):
        try:
            check_mask({**code, "counts": changed}, mask.shape[1], mask.shape[0])
        except OutlineError:
            continue
        assert rle.area({**code, "counts": changed}) == rle.decode({**code, "counts": changed}).sum()


@pytest.mark.parametrize("mask", [None, 3, {}, {"size": [4, 5], "counts": "05"}, {"size": [5, 4], "counts": [20]}])
def test_check_mask__what_is_no_mask_of_the_image(mask: object):
    with pytest.raises(OutlineError, match="not a COCO RLE"):
        check_mask(mask, 4, 5)


@given(st.lists(st.tuples(st.floats(-10, 60), st.floats(-10, 60)), min_size=3, max_size=8), SIDES, SIDES)
def test_outline_mask__any_polygon_gives_a_mask_of_the_image(points: list, width: int, height: int):
    mask = outline_mask([[value for point in points for value in point]], width, height)
    check_mask(mask, width, height)


@given(MASKS)
def test_outline_mask__runs_in_a_list_and_in_a_string_are_the_same_mask(mask: np.ndarray):
    flat = mask.ravel(order="F")
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flat]))).tolist()
    runs = np.diff([0, *edges, flat.size]).tolist()
    height, width = mask.shape
    listed = outline_mask({"size": [height, width], "counts": runs}, width, height)
    assert np.array_equal(rle.decode(listed), mask)
    assert outline_mask(listed, width, height) == listed


@pytest.mark.parametrize("corner", [1e9, -1e300, float("nan"), float("inf")])
def test_outline_mask__a_corner_far_away_costs_no_memory(corner: float):
    with pytest.raises(OutlineError, match="has a corner beyond 1000 pixels"):
        outline_mask([[1, 1, 5, 1, corner, 9]], 20, 10)


def test_outline_mask__other_size_is_told_apart_from_damage():
    with pytest.raises(OtherSizeError, match="mask of 5 x 4, the image is 4 x 5"):
        outline_mask({"size": [4, 5], "counts": [20]}, 4, 5)
    with pytest.raises(OutlineError, match="runs that do not add up to 4 x 5 pixels") as error:
        outline_mask({"size": [5, 4], "counts": [19]}, 4, 5)
    assert not isinstance(error.value, OtherSizeError)
