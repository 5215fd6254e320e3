from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipeline.build import build_dataset
from data_pipeline.contact_sheet import (
    CAPTION,
    GAP,
    TILE,
    class_colour,
    contact_sheet,
    write_contact_sheet,
)
from data_pipeline.errors import DataError
from data_pipeline.manifest import Manifest, Split
from data_pipeline.shards import ShardWriter
from data_pipeline.sources.annotations import encode_mask

PITCH = TILE + GAP


def grey(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), (100, 100, 100)).save(file, "PNG")
    return file.getvalue()


def sheet_of(
    root: Path, facts: dict[str, Any], mask: np.ndarray | None = None, semantic: tuple[str, ...] = ()
) -> np.ndarray:
    """The pixels of a sheet of one grey sample of 100 x 50."""
    sample = {"__key__": "s", "png": grey(100, 50), "json": {"width": 100, "height": 50, **facts}}
    if mask is not None:
        file = io.BytesIO()
        Image.fromarray(mask).save(file, "PNG")
        sample["mask.png"] = file.getvalue()
    with ShardWriter(root, "train") as writer:
        writer.write(sample)
    manifest = Manifest("one", ("cat", "dog"), {"train": Split(tuple(writer.shards))}, semantic_classes=semantic)
    return np.asarray(contact_sheet(root, manifest, "train"))


def at(sheet: np.ndarray, x: float, y: float, row: int = 0) -> tuple[int, ...]:
    """The colour at a place of the sample, 0..1 of its width and height; row 1 is its semantic mask."""
    height = TILE // 2
    return tuple(sheet[int(GAP + row * (height + 2) + y * height), int(GAP + x * TILE)].tolist())


def test_contact_sheet__boxes_have_the_colour_of_their_class(tmp_path: Path):
    sheet = sheet_of(tmp_path, {"boxes": [[25, 10, 75, 40]], "labels": [1]})
    green = class_colour(1)
    column = [at(sheet, 0.25, y) for y in (0.5, 0.6, 0.7)]
    assert column == [green] * 3
    assert at(sheet, 0.5, 0.6) == (100, 100, 100)


def test_contact_sheet__instance_masks_are_tinted_and_outlined(tmp_path: Path):
    mask = np.zeros((50, 100), np.uint8)
    mask[10:40, 50:100] = 1
    sheet = sheet_of(tmp_path, {"boxes": [[0, 0, 100, 50]], "labels": [0], "masks": [encode_mask(mask)]})
    red, green, _ = at(sheet, 0.75, 0.6)
    assert red > 110 and green < 100
    assert at(sheet, 0.25, 0.6) == (100, 100, 100)
    assert class_colour(0) in [at(sheet, x, 0.6) for x in np.linspace(0.48, 0.52, 12)]


def test_contact_sheet__semantic_classes_are_tinted_below_background_stays_and_ignored_is_dark(tmp_path: Path):
    mask = np.zeros((50, 100), np.uint8)
    mask[:, 40:70], mask[:, 70:] = 2, 255
    sheet = sheet_of(tmp_path, {}, mask, semantic=("background", "cat", "dog"))
    assert at(sheet, 0.2, 0.5, row=1) == (100, 100, 100)
    red, green, blue = at(sheet, 0.55, 0.5, row=1)
    assert green > red and green > blue
    assert max(at(sheet, 0.9, 0.5, row=1)) < 50
    assert at(sheet, 0.55, 0.5) == (100, 100, 100)
    legend = sheet[2 * (TILE // 2 + 2) + CAPTION + GAP :].reshape(-1, 3).tolist()
    assert list(class_colour(1)) in legend and list(class_colour(0)) not in legend


def test_contact_sheet__without_background_every_class_is_tinted(tmp_path: Path):
    sheet = sheet_of(tmp_path, {}, np.zeros((50, 100), np.uint8), semantic=("road", "sky"))
    assert at(sheet, 0.5, 0.5, row=1) != (100, 100, 100)


def test_contact_sheet__samples_are_spread_over_the_split(scenes: Path):
    manifest = Manifest.load(scenes)
    sheet = contact_sheet(scenes, manifest, "val", columns=4, rows=2)
    assert sheet.width == 4 * PITCH + GAP
    assert sheet.height > 2 * (2 * TILE + CAPTION)


def test_contact_sheet__images_without_labels_of_any_shape(tmp_path: Path):
    (tmp_path / "photos").mkdir()
    for number, size in enumerate(((300, 20), (20, 300), (1, 1))):
        Image.new("RGB", size, "red").save(tmp_path / "photos" / f"{number}.png")
    manifest = build_dataset("imagefolder", tmp_path / "photos", tmp_path / "out", num_processes=1).manifest
    assert contact_sheet(tmp_path / "out", manifest, "train").size == (6 * PITCH + GAP, TILE + 2 + CAPTION + GAP)


@pytest.mark.parametrize("box", [[0, 0, 0.01, 0.01], [99.99, 49.99, 100, 50], [0, 0, 100, 50]])
def test_contact_sheet__boxes_of_any_size_are_drawn(tmp_path: Path, box: list[float]):
    sheet = sheet_of(tmp_path, {"boxes": [box], "labels": [0], "iscrowd": [1]})
    assert list(class_colour(0)) in sheet.reshape(-1, 3).tolist()


def test_contact_sheet__a_damaged_mask_is_named_before_it_is_read(tmp_path: Path):
    mask = {"size": [50, 100], "counts": "oooooooo"}
    with pytest.raises(DataError, match="sample s: a mask is a damaged COCO RLE"):
        sheet_of(tmp_path, {"boxes": [[0, 0, 9, 9]], "labels": [0], "masks": [mask]})


def test_class_colour__a_hundred_classes_differ():
    assert len({class_colour(number) for number in range(100)}) == 100


def test_write_contact_sheet__any_name_holds_a_png(scenes: Path, tmp_path: Path):
    write_contact_sheet(scenes, Manifest.load(scenes), "val", tmp_path / "sheet.picture")
    with Image.open(tmp_path / "sheet.picture") as sheet:
        assert sheet.format == "PNG"


def test_write_contact_sheet__a_place_that_cannot_be_written(scenes: Path, tmp_path: Path):
    with pytest.raises(DataError, match=r"sheet\.png: cannot be written.*--sheet"):
        write_contact_sheet(scenes, Manifest.load(scenes), "val", tmp_path / "absent" / "sheet.png")
