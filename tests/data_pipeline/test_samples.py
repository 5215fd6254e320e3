"""Samples that turn out to be unusable while a run reads."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from http_store import serving
from small_objects import rectangles, write_objects

from data_pipeline import samples
from data_pipeline.cache import ShardCache
from data_pipeline.errors import DataError
from data_pipeline.manifest import Manifest, Split
from data_pipeline.objects import ObjectDataset, survey_objects
from data_pipeline.quarantine import FILE
from data_pipeline.samples import once, training_loader
from data_pipeline.shards import ShardWriter


def write_with_broken(root: Path, broken: set[int], count: int = 8) -> Path:
    """Images with objects, of which some are no images."""
    whole = write_objects(root / "whole", {"train": rectangles(count)})
    reader = samples.ShardReader(whole, Manifest.load(whole).split("train"))
    out = root / "broken"
    out.mkdir()
    with ShardWriter(out, "train", max_samples=3) as writer:
        for index in range(count):
            fields = reader.read(index)
            fields["json"] = json.loads(fields["json"])
            writer.write({**fields, "png": b"\x89PNG broken"} if index in broken else fields)
    manifest = Manifest.load(whole)
    Manifest("broken", manifest.classes, {"train": Split(tuple(writer.shards))}).save(out)
    return out


def dataset_of(root: Path) -> ObjectDataset:
    return ObjectDataset(root, "train", survey_objects(root, "train", 3, masks=False).usable, 3, False)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_training_loader__the_next_sample_takes_the_place_of_one_that_does_not_decode(tmp_path: Path, num_workers: int):
    dataset = dataset_of(write_with_broken(tmp_path, {2, 3}))
    loader = iter(training_loader(dataset, batch_size=4, num_workers=num_workers, quarantine=tmp_path / "run"))
    seen = [sample.index for _ in range(2) for sample in next(loader)]
    assert sorted(seen) == [0, 1, 4, 4, 4, 5, 6, 7]
    rows = [json.loads(line) for line in (tmp_path / "run" / FILE).read_text().splitlines()]
    assert {row["key"] for row in rows} == {"train-0002", "train-0003"}
    assert {row["shard"] for row in rows} == {"train-000000.tar", "train-000001.tar"}


def test_once__what_does_not_decode_is_left_out(tmp_path: Path):
    dataset = dataset_of(write_with_broken(tmp_path, {0, 7}))
    assert [sample.index for sample in once(dataset, quarantine=tmp_path / "run")] == list(range(1, 7))
    assert len((tmp_path / "run" / FILE).read_text().splitlines()) == 2
    with pytest.raises(DataError, match="sample train-0007"):
        dataset[7]


def test_training_loader__too_many_in_a_row_end_the_run_in_one_line(tmp_path: Path):
    dataset = dataset_of(write_with_broken(tmp_path, set(range(12)), count=12))
    with pytest.raises(DataError, match="10 samples in a row cannot be used, the last") as error:
        next(iter(training_loader(dataset, batch_size=2, num_workers=1)))
    assert "\n" not in str(error.value)


def test_survey__of_a_url_goes_through_the_cache(tmp_path: Path):
    root = write_with_broken(tmp_path, set())
    with serving(root) as store:
        cache = ShardCache(tmp_path / "cache")
        found = survey_objects(store.url, "train", 3, False, cache)
        dataset = ObjectDataset(store.url, "train", found.usable, 3, False, cache=cache)
        assert [sample.index for sample in once(dataset)] == list(range(8))
        assert np.array_equal(found.usable, np.arange(8))
        assert {count for name, count in store.requests.items() if name.endswith(".tar")} == {1}
