from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.errors import DataError
from data_pipeline.manifest import Manifest, Split
from data_pipeline.shards import ShardWriter
from data_pipeline.sources.annotations import encode_mask
from data_pipeline.verify import faults


def image(width: int = 16, height: int = 12, form: str = "PNG") -> bytes:
    data = io.BytesIO()
    Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(data, form)
    return data.getvalue()


def mask(value: int, width: int = 16, height: int = 12) -> bytes:
    data = io.BytesIO()
    Image.fromarray(np.full((height, width), value, np.uint8)).save(data, "PNG")
    return data.getvalue()


WHOLE = encode_mask(np.ones((12, 16), np.uint8))


def faults_of(root: Path, sample: dict, semantic: tuple[str, ...] = ()) -> list[str]:
    with ShardWriter(root, "train") as writer:
        writer.write({"__key__": "s", **sample})
    splits = {"train": Split(tuple(writer.shards))}
    Manifest("one", ("a", "b"), splits, semantic_classes=semantic).save(root)
    return list(faults(root, num_processes=1))


def test_faults__sound_data_has_none(scenes: Path):
    seen: list[int] = []
    assert list(faults(scenes, num_processes=1, progress=seen.append)) == []
    assert sum(seen) == 64


def test_faults__names_every_damaged_shard(scenes: Path, tmp_path: Path):
    root = shutil.copytree(scenes, tmp_path / "copy")
    path = root / "train-000000.tar"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    (root / "val-000000.tar").unlink()
    (root / "extra-000000.tar").touch()
    found = list(faults(root, num_processes=1))
    assert len(found) == 3
    for fault, name in zip(found, ("train-000000", "val-000000", "extra-000000"), strict=True):
        assert name in fault


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"label": 2}, "label 2 of 2 classes"),
        ({"label": "cat"}, "not supported"),
        ({"width": 99, "height": 12}, "is 16 x 12, not 99 x 12"),
        ({"boxes": [[0, 0, 17, 5]], "labels": [1]}, "box [0, 0, 17, 5] in an image of 16 x 12"),
        ({"boxes": [[0, 0, 5, 5]], "labels": [7]}, "label 7"),
        ({"boxes": [[0, 0, 5, 5]], "labels": []}, "1 boxes with 0 labels"),
        ({"boxes": [[0, 0, 5, 5]]}, "1 boxes with 0 labels"),
        ({"boxes": [[0, 0, 5]], "labels": [0]}, "not enough values"),
        ({"boxes": [[0, 0, 5, 5]], "labels": [0], "iscrowd": []}, "1 boxes with 0 iscrowd"),
        ({"boxes": [[0, 0, 5, 5]], "labels": [0], "difficult": [True, False]}, "1 boxes with 2 difficult"),
        ({"boxes": [[0, 0, 5, 5]], "labels": [0], "masks": []}, "1 boxes with 0 masks"),
        (
            {"boxes": [[0, 0, 5, 5]], "labels": [0], "masks": [WHOLE | {"size": [16, 12]}]},
            "mask 0 is not a COCO RLE of size [12, 16]",
        ),
        ({"boxes": [[0, 0, 5, 5]], "labels": [0], "masks": [WHOLE | {"counts": "0"}]}, "mask 0 is a damaged COCO RLE"),
        (
            {"boxes": [[0, 0, 5, 5]], "labels": [0], "masks": [WHOLE | {"counts": "oooo"}]},
            "mask 0 is a damaged COCO RLE",
        ),
        ([], "its JSON is no object"),
    ],
)
def test_faults__labels_and_boxes_out_of_range(tmp_path: Path, facts: object, words: str):
    (fault,) = faults_of(tmp_path, {"png": image(), "json": json.dumps(facts).encode()})
    assert words in fault
    assert "train-000000.tar, sample 0 (s)" in fault


def test_faults__image_that_does_not_decode(tmp_path: Path):
    (fault,) = faults_of(tmp_path, {"png": image()[:-30], "json": b"{}"})
    assert "decode" in fault


def test_faults__no_image(tmp_path: Path):
    assert "has no image" in faults_of(tmp_path, {"json": b"{}"})[0]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (mask(3), "semantic value 3 of 3 semantic classes"),
        (mask(0, width=9), "semantic mask of 9 x 12"),
        (image(), "mode RGB"),
        (b"no png", "not a mask that can be decoded"),
    ],
)
def test_faults__semantic_mask(tmp_path: Path, data: bytes, words: str):
    (fault,) = faults_of(tmp_path, {"png": image(), "json": b"{}", "mask.png": data})
    assert words in fault


@pytest.mark.parametrize("value", [0, 1, 2])
def test_faults__data_sets_older_than_semantic_classes_have_a_background(tmp_path: Path, value: int):
    assert faults_of(tmp_path, {"png": image(), "json": b"{}", "mask.png": mask(value)}) == []


def test_faults__semantic_values_are_those_that_the_manifest_names(tmp_path: Path):
    sample = {"png": image(), "json": b"{}", "mask.png": mask(4)}
    (tmp_path / "five").mkdir()
    assert faults_of(tmp_path / "five", sample, semantic=tuple("abcde")) == []
    (fault,) = faults_of(tmp_path, sample, semantic=tuple("abcd"))
    assert "semantic value 4 of 4 semantic classes" in fault


def test_faults__sound_objects_have_none(tmp_path: Path):
    facts = {"boxes": [[0, 0, 16, 12]], "labels": [1], "masks": [WHOLE], "iscrowd": [0], "areas": [192.0]}
    assert faults_of(tmp_path, {"png": image(), "json": json.dumps(facts).encode()}) == []


def test_faults__ignored_pixels_are_no_fault(tmp_path: Path):
    assert faults_of(tmp_path, {"png": image(), "json": b"{}", "mask.png": mask(255)}) == []


def test_faults__not_a_data_set(tmp_path: Path):
    with pytest.raises(DataError, match="not a data set"):
        list(faults(tmp_path))
