from __future__ import annotations

import io
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle

from data_pipeline.errors import DataError
from data_pipeline.manifest import Manifest
from data_pipeline.rendering import CLASSES, outline
from data_pipeline.scenes import draw_scene, write_scenes
from data_pipeline.shards import ShardReader
from data_pipeline.sources import Sample

COUNT = 40


@pytest.fixture(scope="module")
def drawn() -> list[Sample]:
    return [draw_scene(3, "train", index, 64) for index in range(COUNT)]


def masks_of(sample: Sample) -> np.ndarray:
    """(K, H, W) bool."""
    return np.stack([rle.decode(mask).astype(bool) for mask in sample.masks])


def test_write_scenes__bytes_depend_on_the_seed_alone(tmp_path: Path):
    first = write_scenes(tmp_path / "a", train=6, val=3, size=32, seed=1, num_processes=1)
    second = write_scenes(tmp_path / "b", train=6, val=3, size=32, seed=1, num_processes=2)
    other = write_scenes(tmp_path / "c", train=6, val=3, size=32, seed=2, num_processes=1)
    assert first.hash == second.hash != other.hash
    assert Manifest.load(tmp_path / "a") == first
    assert first.semantic_classes == ("background", *first.classes)
    assert {name: split.num_samples for name, split in first.splits.items()} == {"train": 6, "val": 3}


def test_write_scenes__more_scenes_begin_with_the_same_ones(tmp_path: Path):
    """So a larger data set of the same seed extends a smaller one."""
    manifest = write_scenes(tmp_path / "a", train=2, val=2, size=32, num_processes=1)
    for split in ("train", "val"):
        sample = ShardReader(tmp_path / "a", manifest.split(split)).read(1)
        assert sample["jpg"] == draw_scene(0, split, 1, 32).image


def test_draw_scene__splits_and_indexes_differ():
    images = {draw_scene(0, split, index, 32).image for split in ("train", "val") for index in range(3)}
    assert len(images) == 6


def test_draw_scene__image_has_the_size_asked_for(drawn: list[Sample]):
    for sample in drawn:
        assert (sample.width, sample.height) == (64, 64)
        image = Image.open(io.BytesIO(sample.image))
        assert (image.format, image.size, image.mode) == ("JPEG", (64, 64), "RGB")


def test_draw_scene__boxes_are_tight_around_visible_masks(drawn: list[Sample]):
    for sample in drawn:
        assert len(sample.boxes) == len(sample.labels) == len(sample.masks) >= 1
        for (left, top, right, bottom), mask in zip(sample.boxes, masks_of(sample), strict=True):
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            assert (left, top, right, bottom) == (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)


def test_draw_scene__masks_do_not_overlap_and_agree_with_the_semantic_classes(drawn: list[Sample]):
    for sample in drawn:
        masks = masks_of(sample)
        assert masks.sum(axis=0).max() <= 1
        semantic = np.asarray(Image.open(io.BytesIO(sample.semantic or b"")))
        for mask, label in zip(masks, sample.labels, strict=True):
            assert (semantic[mask] == label + 1).all()
        rest = semantic[~masks.any(axis=0)]
        assert np.isin(rest, (0, 255)).all()


def test_draw_scene__label_is_the_class_of_the_largest_object(drawn: list[Sample]):
    for sample in drawn:
        areas = masks_of(sample).sum(axis=(1, 2))
        assert sample.labels[int(areas.argmax())] == sample.label


@pytest.fixture(scope="module")
def small() -> list[Sample]:
    return [draw_scene(7, "val", index, 32) for index in range(150)]


def test_draw_scene__objects_overlap_and_classes_are_even(small: list[Sample]):
    counts = np.bincount([sample.label or 0 for sample in small], minlength=len(CLASSES))
    assert counts.min() >= 5
    assert np.mean([len(sample.boxes) for sample in small]) > 2


def test_draw_scene__colour_tells_the_class_mostly_but_not_always(small: list[Sample]):
    """The mean colour of an object varies less inside a class than over all of them, but it varies."""
    colours = []
    for sample in small:
        pixels = np.asarray(Image.open(io.BytesIO(sample.image)), np.float32)
        colours.append(pixels[max(masks_of(sample), key=np.sum)].mean(0))
    values, labels = np.stack(colours), np.array([sample.label for sample in small])
    within = np.mean([values[labels == label].var(0).mean() for label in range(len(CLASSES))])
    assert 0.25 * values.var(0).mean() < within < 0.85 * values.var(0).mean()


def test_outline__every_class_has_its_own_silhouette():
    silhouettes = []
    for name in CLASSES:
        mask = np.zeros((120, 120), np.uint8)
        for polygon, value in outline(name):
            cv2.fillPoly(mask, [np.round(polygon * 50 + 60).astype(np.int32)], value)
        silhouettes.append(mask > 0)
    for first in range(len(silhouettes)):
        for second in range(first):
            common = (silhouettes[first] & silhouettes[second]).sum()
            assert common / (silhouettes[first] | silhouettes[second]).sum() < 0.9


@pytest.mark.parametrize(
    "options", [{"train": 0}, {"val": 0}, {"size": 16}, {"size": 5000}, {"seed": -1}], ids=lambda value: str(value)
)
def test_write_scenes__impossible_numbers(tmp_path: Path, options: dict[str, int]):
    with pytest.raises(DataError, match=f"{next(iter(options))}={next(iter(options.values()))}"):
        write_scenes(tmp_path / "out", **{"train": 1, "val": 1, "size": 32, **options})
    assert not (tmp_path / "out").exists()


def test_write_scenes__refuses_a_folder_in_use(tmp_path: Path):
    (tmp_path / "mine").touch()
    with pytest.raises(DataError, match="is there already"):
        write_scenes(tmp_path, train=1, val=1, size=32)


def test_write_scenes__annotations_are_plain_json(tmp_path: Path):
    manifest = write_scenes(tmp_path / "out", train=1, val=1, size=48, num_processes=1)
    facts = json.loads(ShardReader(tmp_path / "out", manifest.split("val")).read(0)["json"])
    assert facts["width"] == facts["height"] == 48
    assert set(facts) == {"width", "height", "label", "boxes", "labels", "masks"}
