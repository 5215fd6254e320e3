from __future__ import annotations

import numpy as np
import pytest

from downstream.errors import TaskError
from downstream.evaluation.anchors import Anchor, through

IMAGES = np.random.default_rng(0).integers(0, 256, (2, 24, 40, 3)).astype(np.uint8).repeat(2, 1).repeat(2, 2)


@pytest.mark.parametrize("name", ["jpeg", "webp", "avif"])
def test_through__higher_quality_costs_more_and_is_nearer(name: str):
    errors, sizes = [], []
    for quality in (5, 50, 95):
        decoded, size = through(Anchor.parse(f"{name}:{quality}"), IMAGES)
        assert decoded.shape == IMAGES.shape
        errors.append(np.abs(decoded.astype(float) - IMAGES).mean())
        sizes.append(size.sum())
    assert sizes == sorted(sizes)
    assert errors == sorted(errors, reverse=True)


def test_header_bytes__are_part_of_every_file():
    anchor = Anchor.parse("jpeg:1")
    _, sizes = through(anchor, IMAGES)
    assert 0 < anchor.header_bytes(48, 80) < sizes.min()


@pytest.mark.parametrize("text", ["gif:3", "jpeg", "jpeg:101", "jpeg:x"])
def test_parse__bad_anchors_are_named(text: str):
    with pytest.raises(TaskError, match=text):
        Anchor.parse(text)
