from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from downstream.tasks.masked_images import IGNORE, MaskedImages, TrainingCrops, epochs_of_batches
from PIL import Image

from data_pipeline.shards import Manifest, ShardWriter, Split
from downstream.errors import TaskError


def png(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def write(root: Path, pixels: np.ndarray, mask: bytes | None) -> Path:
    root.mkdir()
    with ShardWriter(root, "train") as writer:
        fields = {"__key__": "one", "png": png(pixels), "json": {}}
        writer.write(fields if mask is None else {**fields, "mask.png": mask})
    Manifest("m", ("a",), {"train": Split(tuple(writer.shards))}, semantic_classes=("a", "b")).save(root)
    return root


@pytest.fixture
def halves(tmp_path: Path) -> MaskedImages:
    """White is class 1, black class 0, a border of two rows to be ignored is grey."""
    pixels, mask = np.zeros((40, 60, 3), np.uint8), np.zeros((40, 60), np.uint8)
    pixels[:, 30:], mask[:, 30:] = 255, 1
    pixels[:2], mask[:2] = 128, IGNORE
    return MaskedImages(write(tmp_path / "halves", pixels, png(mask)), "train")


def test_masked_images__come_as_they_are(halves: MaskedImages):
    image, mask = halves[0]
    assert image.shape == (3, 40, 60) and mask.shape == (40, 60) and image.dtype == mask.dtype == torch.uint8
    assert torch.equal(image[0] == 255, mask == 1)
    assert set(mask.unique().tolist()) == {0, 1, IGNORE}
    assert halves.classes == ("a", "b")


def test_masked_images__short_side(halves: MaskedImages):
    smaller = MaskedImages(halves.root, "train", short_side=20)[0]
    assert smaller[0].shape == (3, 20, 30) and smaller[1].shape == (20, 30)
    assert set(smaller[1].unique().tolist()) <= {0, 1, IGNORE}


def test_training_crops__image_and_mask_stay_together(halves: MaskedImages):
    """At any scale, place and mirroring, white is class 1; beyond the image nothing counts."""
    crops, seen = TrainingCrops((32, 48)), set()
    for seed in range(40):
        torch.manual_seed(seed)
        image, mask = crops(*halves[0])
        assert image.shape == (3, 32, 48) and mask.shape == (32, 48)
        inside = mask != IGNORE
        agree = ((image[0] > 127) == (mask == 1))[inside].float().mean()
        assert agree > 0.93  # resampling blurs the edge between the halves
        seen.add((bool((mask == IGNORE).float().mean() > 0.3), int(mask[16, 4]) == 1))
    assert len(seen) >= 3
    torch.manual_seed(0)
    first = crops(*halves[0])
    torch.manual_seed(0)
    again = crops(*halves[0])
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


def test_masked_images__refusals(tmp_path: Path):
    pixels, mask = np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8), np.uint8)
    with pytest.raises(TaskError, match="no semantic masks"):
        MaskedImages(write(tmp_path / "none", pixels, None), "train")
    for name, wrong, words in [
        ("size", png(mask[:4]), "image's size"),
        ("junk", b"junk", "image's size"),
        ("class", png(mask + 7), "holds 7, the data set has 2"),
    ]:
        with pytest.raises(TaskError, match=f"sample one.*{words}"):
            MaskedImages(write(tmp_path / name, pixels, wrong), "train")[0]


def test_epochs_of_batches__each_sample_once_an_epoch():
    batches = epochs_of_batches(10, 3, seed=1)
    for _ in range(3):
        epoch = [index for _ in range(3) for index in next(batches)]
        assert len(set(epoch)) == 9
    with pytest.raises(TaskError, match=r"1\.\.10"):
        next(epochs_of_batches(10, 11, seed=0))
