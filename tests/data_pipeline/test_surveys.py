from __future__ import annotations

import logging
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from small_objects import rectangles, write_objects

from data_pipeline import surveys
from data_pipeline.cache import ShardCache
from data_pipeline.surveys import UnusableError, survey


def inspect_odd(sample: dict[str, Any], unit: int = 1) -> tuple[int, Counter[str]]:
    if int(sample["__key__"][-1]) % 2:
        return unit, Counter({"odd": 1})
    raise UnusableError("even")


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set of 8 samples in 3 shards, surveyed as large ones are."""
    monkeypatch.setattr(surveys, "IN_ONE_PROCESS", 0)
    return write_objects(tmp_path / "set", {"train": rectangles(8)}, max_samples=3)


def without_shards(root: Path) -> Path:
    """The data set with its manifest alone: whoever reads a sample fails."""
    for path in root.glob("*.tar"):
        path.unlink()
    return root


def test_survey__in_processes_is_that_of_one(large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    several = survey(large, "train", inspect_odd, ShardCache(tmp_path / "cache"))
    monkeypatch.setattr(surveys, "IN_ONE_PROCESS", 8)
    alone = survey(large, "train", inspect_odd)
    assert alone.usable.tolist() == several.usable.tolist() == [1, 3, 5, 7]
    assert alone.left_out == several.left_out == {"even": 4, "odd": 4} and alone.found == several.found == 4


def test_survey__is_made_once(large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Later starts read no shard, and the folder of the data set may be read-only."""
    monkeypatch.setattr(surveys, "ordered_map", lambda function, jobs, **_: map(function, jobs))
    cache, before = ShardCache(tmp_path / "cache"), sorted(large.iterdir())
    first = survey(large, "train", inspect_odd, cache)
    assert sorted(large.iterdir()) == before
    again = survey(without_shards(large), "train", inspect_odd, cache)
    assert again.usable.dtype == first.usable.dtype and again.usable.tolist() == first.usable.tolist()
    assert again[1:] == first[1:]


def test_survey__of_another_inspection_or_manifest_is_made_again(
    large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(surveys, "ordered_map", lambda function, jobs, **_: map(function, jobs))
    cache = ShardCache(tmp_path / "cache")
    assert survey(large, "train", inspect_odd, cache).found == 4
    assert survey(large, "train", partial(inspect_odd, unit=2), cache).found == 8
    other = write_objects(tmp_path / "other", {"train": rectangles(6)}, max_samples=3)
    assert survey(other, "train", inspect_odd, cache).found == 3


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 torn"])
def test_survey__a_damaged_one_is_made_again(
    large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, damage: bytes
):
    monkeypatch.setattr(surveys, "ordered_map", lambda function, jobs, **_: map(function, jobs))
    cache = ShardCache(tmp_path / "cache")
    survey(large, "train", inspect_odd, cache)
    (kept,) = (tmp_path / "cache" / "surveys").iterdir()
    kept.write_bytes(damage)
    with caplog.at_level(logging.WARNING):
        assert survey(large, "train", inspect_odd, cache).found == 4
    assert f"{kept}: a survey that cannot be read" in caplog.text
    caplog.clear()
    assert survey(without_shards(large), "train", inspect_odd, cache).found == 4
    assert not caplog.records


def test_survey__a_cache_that_cannot_be_written_is_no_end(
    large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(surveys, "ordered_map", lambda function, jobs, **_: map(function, jobs))
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "surveys").write_text("no folder")
    with caplog.at_level(logging.WARNING):
        assert survey(large, "train", inspect_odd, ShardCache(tmp_path / "cache")).found == 4
    assert "cannot be kept" in caplog.text and "shard_cache=DIR" in caplog.text
