from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from data_pipeline.build import build_dataset
from data_pipeline.errors import DataError
from data_pipeline.inspect import split_facts
from data_pipeline.manifest import Manifest
from data_pipeline.shards import ShardReader


def test_split_facts__counts_what_the_samples_hold(scenes: Path):
    manifest = Manifest.load(scenes)
    ticks: list[int] = []
    facts = split_facts(scenes, manifest, "train", ticks.append)
    reader = ShardReader(scenes, manifest.split("train"))
    notes = [json.loads(reader.read(index)["json"]) for index in range(48)]
    assert facts.samples == facts.semantic == sum(ticks) == 48
    assert facts.widths == facts.heights == {64: 48}
    assert facts.boxes == facts.masks == sum(len(note["boxes"]) for note in notes)
    assert facts.labels == facts.class_images == Counter(note["label"] for note in notes)
    assert facts.box_labels == Counter(label for note in notes for label in note["labels"])
    assert facts.box_images == Counter(label for note in notes for label in set(note["labels"]))
    assert facts.semantic_pixels.total() == 48 * 64 * 64
    assert facts.semantic_images[0] == 48
    assert all(facts.semantic_images[label + 1] == count for label, count in facts.box_images.items())


def test_split_facts__shards_and_processes_add_up(tmp_path: Path):
    (tmp_path / "photos").mkdir()
    for number in range(5):
        Image.new("RGB", (20 + 10 * number, 20)).save(tmp_path / "photos" / f"{number}.png")
    manifest = build_dataset(
        "imagefolder", tmp_path / "photos", tmp_path / "out", shard_samples=2, num_processes=1
    ).manifest
    one, two = (split_facts(tmp_path / "out", manifest, "train", num_processes=number) for number in (1, 2))
    assert one == two
    assert (one.samples, one.shards) == (5, 3)
    assert one.bytes == sum(path.stat().st_size for path in (tmp_path / "out").glob("*.tar"))
    assert one.sides.total() == 5 and one.class_images == {}


def test_split_facts__a_damaged_shard_is_named(scenes: Path, tmp_path: Path):
    manifest = Manifest.load(scenes)
    with pytest.raises(DataError, match=r"val-000000\.tar: cannot be read"):
        split_facts(tmp_path, manifest, "val", num_processes=1)
