from __future__ import annotations

import json
from pathlib import Path

import pytest
from hostile_files import mutated, touched_files
from http_store import HttpStore
from small_codecs import create_codec

from data_pipeline.cache import ShardCache
from data_pipeline.errors import DataError, StoreError
from data_pipeline.manifest import Manifest
from data_pipeline.shards import ShardReader
from data_pipeline.storage import Retries
from pretrain.codec import pretrained
from pretrain.codec.feature_codec import FeatureCodec
from pretrain.errors import CodecError

COUNT = 500
LONGEST_LINE = 1000


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A file outside the folders that a reader may touch."""
    path = tmp_path / "mine" / "train-000000.tar"
    path.parent.mkdir()
    path.write_bytes(b"mine")
    return path


def outside(touched: list[str], *allowed: Path) -> list[str]:
    return [path for path in touched if not any(Path(path).is_relative_to(folder) for folder in allowed)]


def are_lines(refused: list[str]) -> bool:
    return all("\n" not in line and len(line) < LONGEST_LINE for line in refused)


def test_load__a_hostile_manifest_is_refused_in_a_line_or_read_and_touches_nothing(
    store: HttpStore, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, victim: Path
):
    good = json.loads((store.folder / "dataset.json").read_text())
    good["splits"]["train"]["shards"] = good["splits"]["train"]["shards"][:2]
    data, cache = tmp_path / "set", tmp_path / "cache"
    data.mkdir()
    refused = []
    with touched_files() as touched:
        for seed in range(COUNT):
            (data / "dataset.json").write_bytes(mutated(good, seed, victim))
            try:
                for split in Manifest.load(data).splits.values():
                    reader = ShardReader(store.url, split, ShardCache(cache, retries=Retries(1, 0.01, 5.0)))
                    for index in range(len(reader)):
                        reader.read(index)
            except (DataError, StoreError) as error:
                refused.append(str(error))
    assert COUNT // 2 < len(refused) < COUNT and are_lines(refused)
    assert outside(touched, data, cache) == []
    assert [path.name for path in victim.parent.iterdir()] == [victim.name] and victim.read_bytes() == b"mine"


def test_from_pretrained__a_hostile_config_is_refused_in_a_line_or_read_and_touches_nothing(
    tmp_path: Path, victim: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HOME", "/hunter2")
    codec = tmp_path / "codec"
    create_codec(backbone="test_resnet").save_pretrained(codec, extra={"image_size": 64, "stages": [{"epochs": 1}]})
    good = json.loads((codec / "config.json").read_text())
    accepted, refused = [], []
    with touched_files() as touched:
        for seed in range(COUNT):
            content = mutated(good, seed, victim)
            (codec / "config.json").write_bytes(content)
            try:
                pretrained.codec_config(codec, pretrained.read_config(codec))
                accepted.append(content)
            except CodecError as error:
                refused.append(str(error))
        assert len(refused) > COUNT // 4
        for content in accepted[:: len(accepted) // 5]:  # the weights are read, which takes longer
            (codec / "config.json").write_bytes(content)
            try:
                FeatureCodec.from_pretrained(codec)
            except CodecError as error:
                refused.append(str(error))
    assert are_lines(refused) and not any("hunter2" in line for line in refused)
    assert outside(touched, codec) == []
    assert victim.read_bytes() == b"mine"
