from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.build import build_imagefolder
from data_pipeline.errors import DataError
from data_pipeline.inspect import COLOURS, contact_sheet, split_facts, write_contact_sheet
from data_pipeline.shards import Manifest, ShardReader


def test_split_facts__counts_what_the_samples_hold(scenes: Path):
    manifest = Manifest.load(scenes)
    ticks: list[int] = []
    facts = split_facts(scenes, manifest, "train", lambda: ticks.append(1))
    reader = ShardReader(scenes, manifest.split("train"))
    notes = [json.loads(reader.read(index)["json"]) for index in range(48)]
    assert facts.samples == facts.semantic == len(ticks) == 48
    assert facts.widths == facts.heights == (64, 64)
    assert facts.boxes == facts.masks == sum(len(note["boxes"]) for note in notes)
    assert facts.labels.total() == 48 and facts.labels[notes[0]["label"]] >= 1


def test_contact_sheet__draws_boxes_over_the_images(scenes: Path):
    manifest = Manifest.load(scenes)
    sheet = contact_sheet(scenes, manifest, "val", columns=4, rows=2)
    assert sheet.size == (4 * 160, 2 * 176)
    facts = json.loads(ShardReader(scenes, manifest.split("val")).read(0)["json"])
    _, _, right, bottom = (round(2 + value * 156 / 64) for value in facts["boxes"][-1])
    near = np.asarray(sheet)[bottom - 2 : bottom + 3, right - 2 : right + 3].reshape(-1, 3).tolist()
    assert list(bytes.fromhex(COLOURS[facts["labels"][-1]][1:])) in near


def test_contact_sheet__images_without_labels_of_any_shape(tmp_path: Path):
    (tmp_path / "photos").mkdir()
    for number, size in enumerate(((300, 20), (20, 300), (1, 1))):
        Image.new("RGB", size, "red").save(tmp_path / "photos" / f"{number}.png")
    manifest, _ = build_imagefolder(tmp_path / "photos", tmp_path / "out", num_processes=1)
    assert contact_sheet(tmp_path / "out", manifest, "train").size == (8 * 160, 176)


def test_write_contact_sheet__any_name_holds_a_png(scenes: Path, tmp_path: Path):
    write_contact_sheet(scenes, Manifest.load(scenes), "val", tmp_path / "sheet.picture")
    with Image.open(tmp_path / "sheet.picture") as sheet:
        assert sheet.format == "PNG"


def test_write_contact_sheet__a_place_that_cannot_be_written(scenes: Path, tmp_path: Path):
    with pytest.raises(DataError, match=r"sheet\.png: cannot be written.*--sheet"):
        write_contact_sheet(scenes, Manifest.load(scenes), "val", tmp_path / "absent" / "sheet.png")
