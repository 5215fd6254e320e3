from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, features

from downstream.errors import TaskError
from downstream.evaluation.anchors import FORMATS, Anchor, through

AVAILABLE = [name for name in FORMATS if name == "jpeg" or features.check(name)]


def photo(height: int = 48, width: int = 80) -> np.ndarray:
    """Smooth colours with some noise."""
    y, x = np.mgrid[:height, :width]
    base = np.stack([x * 3, y * 4, 255 - x - y], axis=2).clip(0, 255)
    return (base * 0.8 + np.random.default_rng(0).integers(0, 50, base.shape)).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("name", AVAILABLE)
def test_encode__is_a_real_file_that_decodes_to_the_same_size(name: str):
    anchor, image = Anchor.parse(f"{name}:60"), photo()
    data = anchor.encode(image)
    assert Image.open(io.BytesIO(data)).format == FORMATS[name]["format"]
    decoded = anchor.decode(data)
    assert decoded.shape == image.shape and decoded.dtype == np.uint8
    assert np.abs(decoded.astype(int) - image).mean() < 20


@pytest.mark.parametrize("name", AVAILABLE)
def test_encode__more_quality_costs_more_bytes_and_gives_a_nearer_image(name: str):
    image = photo()
    low, high = Anchor.parse(f"{name}:5"), Anchor.parse(f"{name}:90")
    assert len(low.encode(image)) < len(high.encode(image))
    errors = [np.square(a.decode(a.encode(image)).astype(float) - image).mean() for a in (low, high)]
    assert errors[1] < errors[0]


@pytest.mark.parametrize("name", AVAILABLE)
def test_header_bytes__are_most_of_a_flat_file_and_less_than_any_picture(name: str):
    anchor = Anchor.parse(f"{name}:30")
    header = anchor.header_bytes(48, 80)
    assert 0 < header < len(anchor.encode(photo()))
    assert header == len(anchor.encode(np.full((48, 80, 3), 128, np.uint8)))


def test_through__sizes_and_images_in_order():
    images = np.stack([photo(), np.zeros((48, 80, 3), np.uint8)])
    anchor = Anchor("jpeg", 30)
    decoded, sizes = through(anchor, images)
    assert sizes.tolist() == [len(anchor.encode(image)) for image in images]
    assert np.array_equal(decoded[1], anchor.decode(anchor.encode(images[1])))


@pytest.mark.parametrize("text", ["jpg:30", "jpeg", "jpeg:", "jpeg:101", "jpeg:-1", "jpeg:3.5", ":30"])
def test_parse__wrong_text_is_named_with_an_example(text: str):
    with pytest.raises(TaskError, match=r"for example \w+:30"):
        Anchor.parse(text)
