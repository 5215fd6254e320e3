from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipeline.errors import DataError
from data_pipeline.manifest import Manifest, Split
from data_pipeline.masks import IGNORE, MaskDataset, TrainingCrops, survey_masks
from data_pipeline.samples import training_loader
from data_pipeline.shards import ShardWriter


def png(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def write(root: Path, samples: list[tuple[np.ndarray, bytes | None]]) -> Path:
    root.mkdir()
    with ShardWriter(root, "train") as writer:
        for number, (pixels, mask) in enumerate(samples):
            facts = {"width": pixels.shape[1], "height": pixels.shape[0]}
            fields = {"__key__": f"s{number}", "png": png(pixels), "json": facts}
            writer.write(fields if mask is None else {**fields, "mask.png": mask})
    Manifest("m", ("a",), {"train": Split(tuple(writer.shards))}, semantic_classes=("a", "b")).save(root)
    return root


def half() -> tuple[np.ndarray, np.ndarray]:
    """White is class 1, black class 0, a border of two rows to be ignored is grey."""
    pixels, mask = np.zeros((40, 60, 3), np.uint8), np.zeros((40, 60), np.uint8)
    pixels[:, 30:], mask[:, 30:] = 255, 1
    pixels[:2], mask[:2] = 128, IGNORE
    return pixels, mask


@pytest.fixture
def halves(tmp_path: Path) -> Path:
    pixels, mask = half()
    return write(tmp_path / "halves", [(pixels, png(mask))] * 5)


def dataset_of(root: Path, **options) -> MaskDataset:
    return MaskDataset(root, "train", survey_masks(root, "train", 2).usable, 2, **options)


def test_dataset__samples_come_as_they_are(halves: Path):
    sample = dataset_of(halves)[0]
    assert sample.image.shape == (3, 40, 60) and sample.mask.shape == (40, 60)
    assert sample.image.dtype == sample.mask.dtype == torch.uint8
    assert torch.equal(sample.image[0] == 255, sample.mask == 1)
    assert set(sample.mask.unique().tolist()) == {0, 1, IGNORE}


def test_dataset__short_side(halves: Path):
    smaller = dataset_of(halves, short_side=20)[0]
    assert smaller.image.shape == (3, 20, 30) and smaller.mask.shape == (20, 30)
    assert set(smaller.mask.unique().tolist()) <= {0, 1, IGNORE}


def test_training_crops__image_and_mask_stay_together(halves: Path):
    """At any scale, place and mirroring, white is class 1; beyond the image nothing counts."""
    crops, seen = TrainingCrops((32, 48)), set()
    sample = dataset_of(halves)[0]
    for seed in range(40):
        torch.manual_seed(seed)
        image, mask = crops(sample.image, sample.mask)
        assert image.shape == (3, 32, 48) and mask.shape == (32, 48)
        inside = mask != IGNORE
        agree = ((image[0] > 127) == (mask == 1))[inside].float().mean()
        assert agree > 0.93  # resampling blurs the edge between the halves
        seen.add((bool((mask == IGNORE).float().mean() > 0.3), int(mask[16, 4]) == 1))
    assert len(seen) >= 3


@pytest.mark.parametrize("num_workers", [0, 2])
def test_training_loader__crops_depend_on_seed_and_position_alone(halves: Path, num_workers: int):
    """Whoever reads a sample, in whatever process, at whatever resume, draws the same; another epoch draws anew."""
    dataset = dataset_of(halves, crops=TrainingCrops((32, 48)), seed=3)
    torch.manual_seed(7)
    whole = iter(training_loader(dataset, batch_size=2, seed=3))
    batches = [next(whole)]
    state = torch.get_rng_state()
    batches += [next(whole) for _ in range(4)]
    assert torch.equal(torch.get_rng_state(), state)  # nobody else's draws are disturbed
    later = iter(training_loader(dataset, batch_size=2, seed=3, samples_seen=4, num_workers=num_workers))
    for batch in batches[2:]:
        for one, other in zip(batch, next(later), strict=True):
            assert one.index == other.index
            assert torch.equal(one.image, other.image) and torch.equal(one.mask, other.mask)
    ranks = [iter(training_loader(dataset, batch_size=2, seed=3, rank=rank, world=2)) for rank in (0, 1)]
    shared = [sample for rank in ranks for sample in next(rank)]
    assert any(torch.equal(shared[0].image, sample.image) for sample in batches[0])
    firsts = [sample.image for batch in batches for sample in batch if sample.index == 0]
    assert len(firsts) >= 2 and not torch.equal(firsts[0], firsts[1])


def test_survey__what_says_nothing_is_left_out_with_a_count(tmp_path: Path):
    pixels, mask = half()
    tiny = np.zeros((8, 40, 3), np.uint8)
    samples = [
        (pixels, png(mask)),
        (pixels, None),
        (pixels, png(mask[:20])),
        (pixels, b"junk"),
        (pixels, b""),
        (pixels, png(np.stack([mask] * 3, axis=2))),
        (pixels, png(np.full_like(mask, IGNORE))),
        (pixels, png(np.where(mask == 1, 7, mask).astype(np.uint8))),
        (tiny, png(tiny[..., 0])),
        (pixels, png(mask)),
    ]
    found = survey_masks(write(tmp_path / "spoiled", samples), "train", 2)
    assert found.usable.tolist() == [0, 9] and found.found == 2
    assert found.left_out == {
        "image without a semantic mask": 1,
        "mask of another size than its image": 1,
        "mask that is no 8-bit grey PNG": 3,
        "mask that is 255, ignored, everywhere": 1,
        "mask with a class that the data set does not name": 1,
        "image smaller than 16 pixels": 1,
    }


def test_dataset__an_image_of_another_size_than_its_mask_is_named(tmp_path: Path):
    """Shards of other makers may not note the size; then only the picture tells."""
    pixels, mask = half()
    root = tmp_path / "data"
    root.mkdir()
    with ShardWriter(root, "train") as writer:
        writer.write({"__key__": "one", "png": png(pixels), "json": {}, "mask.png": png(mask[:20])})
    Manifest("m", ("a",), {"train": Split(tuple(writer.shards))}, semantic_classes=("a", "b")).save(root)
    with pytest.raises(DataError, match="sample one: is 60 x 40, its mask 60 x 20"):
        dataset_of(root)[0]
