from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.build import build_imagefolder
from data_pipeline.errors import DataError
from data_pipeline.shards import Manifest, ShardReader


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Six images of two classes in three formats, and two files that are no images."""
    root = tmp_path / "photos"
    random = np.random.default_rng(0)
    for number, suffix in enumerate(("jpg", "png", "webp", "JPEG", "PNG", "jpg")):
        path = root / "ab"[number % 2] / f"{number}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 255, (20 + number, 30, 3), np.uint8)).save(path)
    (root / "a" / "cut.png").write_bytes((root / "b" / "1.png").read_bytes()[:300])
    (root / "b" / "text.jpg").write_text("no image")
    return root


def test_build_imagefolder__stores_bytes_as_they_came(photos: Path, tmp_path: Path):
    manifest, _ = build_imagefolder(photos, tmp_path / "out", num_processes=1)
    assert manifest.name == "photos" and manifest.classes == ("a", "b")
    reader = ShardReader(tmp_path / "out", Manifest.load(tmp_path / "out").split("train"))
    expected = ["a/0.jpg", "a/2.webp", "a/4.PNG", "b/1.png", "b/3.JPEG", "b/5.jpg"]
    for index, name in enumerate(expected):
        sample = reader.read(index)
        extension = {"JPEG": "jpg", "PNG": "png"}.get(name.split(".")[1], name.split(".")[1])
        assert sample[extension] == (photos / name).read_bytes()
        number = int(name[2])
        facts = {"width": 30, "height": 20 + number, "label": number % 2, "image_id": str(number)}
        assert json.loads(sample["json"]) == facts


def test_build_imagefolder__lists_what_does_not_decode(photos: Path, tmp_path: Path):
    manifest, rejected = build_imagefolder(photos, tmp_path / "out", num_processes=1)
    assert manifest.split("train").num_samples == 6
    lines = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert [Path(line["file"]).name for line in lines] == ["cut.png", "text.jpg"]
    assert all(line["reason"] for line in lines) and len(rejected) == 2


def test_build_imagefolder__bytes_do_not_depend_on_processes(photos: Path, tmp_path: Path):
    first, _ = build_imagefolder(photos, tmp_path / "one", num_processes=1)
    second, _ = build_imagefolder(photos, tmp_path / "two", num_processes=2)
    assert first.hash == second.hash


def test_build_imagefolder__val_fraction_takes_its_share_of_each_class(photos: Path, tmp_path: Path):
    (photos / "a" / "cut.png").unlink()
    (photos / "b" / "text.jpg").unlink()
    manifest, rejected = build_imagefolder(photos, tmp_path / "out", val_fraction=0.34, num_processes=1)
    assert rejected == [] and not (tmp_path / "out" / "rejected.jsonl").exists()
    assert {name: split.num_samples for name, split in manifest.splits.items()} == {"train": 4, "val": 2}
    reader = ShardReader(tmp_path / "out", manifest.split("val"))
    assert {json.loads(reader.read(index)["json"])["label"] for index in range(2)} == {0, 1}


@pytest.mark.parametrize("fraction", [-0.1, 1.0])
def test_build_imagefolder__impossible_val_fraction(photos: Path, tmp_path: Path, fraction: float):
    with pytest.raises(DataError, match="val-fraction="):
        build_imagefolder(photos, tmp_path / "out", val_fraction=fraction)


def test_build_imagefolder__no_image_decodes(tmp_path: Path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "x.jpg").write_text("no image")
    with pytest.raises(DataError, match=r"none of its 1 images decodes .*x\.jpg"):
        build_imagefolder(tmp_path / "source", tmp_path / "out", num_processes=1)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_build_imagefolder__refuses_a_folder_in_use(photos: Path, tmp_path: Path):
    with pytest.raises(DataError, match="is there already"):
        build_imagefolder(photos, photos, num_processes=1)
    assert (photos / "a" / "0.jpg").is_file()


def test_build_imagefolder__reports_progress(photos: Path, tmp_path: Path):
    seen: list[int] = []
    build_imagefolder(photos, tmp_path / "out", num_processes=1, on_total=seen.append, progress=lambda: seen.append(1))
    assert seen == [8] + [1] * 8
