from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
from conftest import small_run
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))  # workers import the functions by name

from run_functions import summarize

from cluster.runtime import run
from data_pipeline.manifest import Manifest, Split
from data_pipeline.shards import ShardWriter
from pretrain.evaluation import has_labels


@pytest.mark.parametrize(
    ("facts", "expected"), [({"label": 0}, True), ({"boxes": [[0, 0, 9, 9]], "labels": [0]}, False)]
)
def test_has_labels__classes_may_be_those_of_boxes(tmp_path: Path, facts: dict, expected: bool):
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "PNG")
    with ShardWriter(tmp_path, "train") as writer:
        writer.write({"__key__": "a", "png": file.getvalue(), "json": facts})
    Manifest("one", ("thing",), {"train": Split(tuple(writer.shards))}).save(tmp_path)
    assert has_labels(str(tmp_path), "train") is expected


def test_write_summary__ranks_share_the_images_and_say_what_one_says(scenes: Path, tmp_path: Path):
    said = {}
    for world in (1, 2):
        folder = tmp_path / str(world)
        folder.mkdir()
        rates = ["codec.rate_points=2", "stages.codec.rates=[2,1]"]
        config = small_run(scenes, folder, "image_size=64", "canvas_size=64", *rates)
        run(summarize, config, workers=world, launcher="local", run_dir=str(folder))
        said[world] = json.loads((folder / "summary.json").read_text())
        # 16 images of the val split, at the best rate and at five.
        assert [int((folder / f"{rank}.txt").read_text()) for rank in range(world)] == [96 // world] * world
    assert said[1] == said[2]
    assert said[1]["progress"] == {"step": 7} and said[1]["streams"]["images"] == 16
    assert len(said[1]["streams"]["bpp_at_rate"]) == 5
