from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image

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
