"""cache=bitstreams: the training set is encoded once, and training reads what it would have encoded."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_refused, dicm
from small_codecs import create_codec
from small_objects import NARROW_DETECTOR, SMALL_CROPS, rectangles, write_objects

from cluster.metrics import read_rows
from cluster.runtime import LocalRuntime, on_sigterm
from data_pipeline.errors import DataError
from data_pipeline.manifest import Manifest
from data_pipeline.scenes import write_scenes
from downstream import finetune, stream_cache
from downstream.errors import TaskError
from downstream.stream_cache import STREAM, StreamDataset
from pretrain.codec.feature_codec import FeatureCodec

CASES: dict[str, list[str]] = {
    "classification": ["batch_size=8", "image_size=64", "canvas_size=64"],
    "detection_small": NARROW_DETECTOR,
    "instance_segmentation_small": [*NARROW_DETECTOR, "gate=dynamic"],
    "semantic_segmentation_small": SMALL_CROPS,
}


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("codecs") / "narrow"
    create_codec(backbone="test_resnet").save_pretrained(folder, extra={"image_size": 64, "canvas_size": 64})
    return folder


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of 16 + 4 scenes."""
    folder = tmp_path_factory.mktemp("data") / "few"
    write_scenes(folder, train=16, val=4, size=64, seed=0)
    return folder


def config_of(recipe: str, codec: Path, data: Path, run: Path, *more: str):
    common = ["launcher=local", "precision=fp32", "epochs=3", "log_every=1", "cache=bitstreams", "cache_views=3"]
    places = [f"codec={codec}", f"data={data}", f"run={run}"]
    return finetune.resolve(recipe, [*places, *common, *CASES[recipe], *more])


@pytest.fixture(scope="module")
def whole(codec: Path, few: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete classification."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    finetune.run(config_of("classification", codec, few, folder))
    return folder


def task_of(config: Any):
    tuner = finetune.create_tuner(config)
    tuner.enter(tuner.stages[-1])
    return tuner.task


@pytest.mark.parametrize("recipe", CASES)
def test_run__trains_from_streams_that_were_encoded_once(recipe: str, codec: Path, few: Path, tmp_path: Path):
    config = config_of(recipe, codec, few, tmp_path / "run")
    results = finetune.run(config)
    assert results["images"] == 4
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert rows[0]["stage"] == "streams" and rows[0]["encoding_seconds"] > 0
    folder = tmp_path / "run" / "streams"
    manifest = Manifest.load(folder)
    views = 2 if recipe.startswith(("detection", "instance")) else 3
    assert [split.num_samples for split in manifest.splits.values()] == [16] * views
    task = task_of(config)
    dataset = StreamDataset.of_task(task)
    for number in (0, 13):
        seen = set()
        for turn in range(views):
            sample = dataset.raw(number, turn * len(dataset))
            image, fields = task.view(number, (turn + number) % views)
            assert sample[STREAM] == task.source.encode(image)
            if "mask.png" in fields:
                assert sample["mask.png"] == fields["mask.png"]
            seen.add(sample[STREAM])
        assert len(seen) == views  # an epoch later another view of the image is read


def test_run__loss_from_streams_is_that_of_the_images_they_were_made_of(codec: Path, tmp_path: Path):
    """Without mirroring there is one view, the image itself: both ways train on the same features."""
    data = write_objects(tmp_path / "data", {"train": rectangles(8), "val": rectangles(2)})
    losses = []
    for cache in ("none", "bitstreams"):
        run = tmp_path / cache
        finetune.run(config_of("detection_small", codec, data, run, f"cache={cache}", "flip=false", "epochs=2"))
        losses.append([row["loss"] for row in read_rows(run / "metrics.jsonl") if "loss" in row])
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


def test_build_streams__goes_on_with_what_was_encoded(
    codec: Path, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(stream_cache, "PART", 6)
    assert stream_cache.build_streams(task_of(config_of("classification", codec, few, tmp_path / "whole")))
    config = config_of("classification", codec, few, tmp_path / "cut")
    task = task_of(config)
    encode, calls, resumed = task.source.encode, [], []

    def failing(image: torch.Tensor) -> bytes:
        calls.append(1)
        if len(calls) == 24 and not resumed:
            raise RuntimeError("cut off")
        return encode(image)

    monkeypatch.setattr(task.source, "encode", failing)
    with pytest.raises(RuntimeError, match="cut off"):
        stream_cache.build_streams(task)
    assert not (tmp_path / "cut" / "streams" / "dataset.json").exists()
    calls.clear()
    resumed.append(True)
    stream_cache.build_streams(task)
    assert len(calls) == 3 * 16 - (16 + 6)  # the first view and a part of the second were whole
    manifests = [Manifest.load(tmp_path / name / "streams") for name in ("whole", "cut")]
    assert [shard.sha256 for split in manifests[0].splits.values() for shard in split.shards] == [
        shard.sha256 for split in manifests[1].splits.values() for shard in split.shards
    ]


@pytest.mark.slow
def test_run__two_workers_share_the_parts_and_see_each_sample_once(whole: Path, codec: Path, few: Path, tmp_path: Path):
    """Plain torch DDP; the validation images of both ranks add up to the split."""
    results = finetune.run(config_of("classification", codec, few, tmp_path / "both", "workers=2"))
    alone, both = (Manifest.load(run / "streams") for run in (whole, tmp_path / "both"))
    assert alone.splits == both.splits
    assert results["images"] == 4
    assert read_rows(tmp_path / "both" / "metrics.jsonl")[-1]["step"] == 3 * 16 // 8


def test_cache_folder__serves_other_runs_and_refuses_what_was_made_otherwise(codec: Path, few: Path, tmp_path: Path):
    shared = f"cache_folder={tmp_path / 'streams'}"
    finetune.run(config_of("classification", codec, few, tmp_path / "a", shared, "epochs=1"))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "streams").glob("*.tar")}
    finetune.run(config_of("classification", codec, few, tmp_path / "b", shared, "lr=0.01", "epochs=1"))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "streams").glob("*.tar")} == before
    assert not (tmp_path / "b" / "streams").exists()
    common = [f"codec={codec}", f"data={few}", f"run={tmp_path / 'c'}", "launcher=local", "cache=bitstreams",
              "cache_views=3", *CASES["classification"], shared]  # fmt: skip
    assert_refused(dicm("finetune", "classification", *common, "scale_min=0.9"), "scale_min", "0.4 there, 0.9 here")
    other = shutil.copytree(codec, tmp_path / "codec")
    with torch.no_grad():
        changed = FeatureCodec.from_pretrained(other)
        changed.g_a[-1].weight.mul_(2)
        shutil.rmtree(other)
        changed.save_pretrained(other, extra={"image_size": 64, "canvas_size": 64})
    assert_refused(dicm("finetune", "classification", *common, f"codec={other}"), "codec (content)", "cache_folder")
    assert not (tmp_path / "c").exists()
    (tmp_path / "streams" / "streams.json").write_text(json.dumps([1]))
    assert_refused(dicm("finetune", "classification", *common), "streams.json")


def test_cache__is_refused_where_it_is_idle(codec: Path, few: Path, tmp_path: Path):
    places = [f"codec={codec}", f"data={few}", f"run={tmp_path / 'run'}"]
    assert_refused(dicm("finetune", "classification", *places, "cache=bitstreams", "probe=true"), "probe=true")
    assert_refused(dicm("finetune", "classification", *places, "cache=pictures"), "cache=pictures", "bitstreams")
    assert_refused(dicm("finetune", "classification", *places, "cache_views=0"), "cache_views=0")


def test_cache_folder__that_holds_something_else_is_left_alone(codec: Path, few: Path, tmp_path: Path):
    data = shutil.copytree(few, tmp_path / "data")
    before = {path: path.read_bytes() for path in data.iterdir()}
    places = [f"codec={codec}", f"data={data}", f"run={tmp_path / 'run'}", "launcher=local", f"cache_folder={data}",
              "batch_size=8"]  # fmt: skip
    assert_refused(dicm("finetune", "classification", *places, "cache=bitstreams"), str(data), "other than streams")
    assert {path: path.read_bytes() for path in data.iterdir()} == before


@pytest.mark.parametrize("same", [True, False])
def test_prepare_folder__of_two_that_begin_at_once_the_second_compares_itself_with_the_first(
    same: bool, codec: Path, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = config_of("detection_small", codec, few, tmp_path / "run")
    folder, write = stream_cache.stream_folder(config), stream_cache.write_whole
    folder.mkdir(parents=True)
    (folder / ".streams.json.1").touch()  # the other is about to write

    def write_second(path: Path, content: str, *, new: bool) -> None:
        write(path, content if same else json.dumps({"rate": 1}))
        write(path, content, new=new)

    monkeypatch.setattr(stream_cache, "write_whole", write_second)
    if same:
        stream_cache.prepare_folder(config, {})
    else:
        with pytest.raises(TaskError, match="holds streams that were made otherwise"):
            stream_cache.prepare_folder(config, {})
        assert json.loads((folder / "streams.json").read_text()) == {"rate": 1}


def test_cache_folder__streams_without_pixels_do_not_serve_a_loss_that_needs_them(
    codec: Path, few: Path, tmp_path: Path
):
    shared = f"cache_folder={tmp_path / 'streams'}"
    finetune.run(config_of("detection_small", codec, few, tmp_path / "a", shared, "epochs=1"))
    with pytest.raises(TaskError, match="pixels: False there, True here"):
        finetune.run(config_of("detection_small", codec, few, tmp_path / "b", shared, "gate=dynamic"))
    finetune.run(
        config_of("detection_small", codec, few, tmp_path / "c", shared, "gate=dynamic", "feature_weight=0", "epochs=1")
    )  # its streams are the same


def test_build_streams__damaged_parts_are_made_again(whole: Path, codec: Path, few: Path, tmp_path: Path):
    config = config_of("classification", codec, few, shutil.copytree(whole, tmp_path / "run"))
    folder = tmp_path / "run" / "streams"
    before = Manifest.load(folder)
    (folder / "parts" / "view0-000000.json").write_text("x")
    (folder / before.split("view1").shards[0].name).unlink()
    task = task_of(config)
    assert stream_cache.build_streams(task)
    assert Manifest.load(folder).splits == before.splits
    assert StreamDataset.of_task(task).raw(3, 16)[STREAM]
    shard = folder / before.split("view2").shards[0].name
    data = bytearray(shard.read_bytes())
    data[600] ^= 1
    shard.write_bytes(data)
    with pytest.raises(DataError, match=r"remove .*streams, they are made again"):
        StreamDataset.of_task(task).raw(3, 32)


def test_build_streams__sigterm_stops_between_parts(
    codec: Path, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(stream_cache, "PART", 8)
    task = task_of(config_of("classification", codec, few, tmp_path / "run"))
    done: list[int] = []

    def tell(number: int, total: int) -> None:
        done.append(number)
        if number == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    task.runtime = runtime = LocalRuntime()
    with on_sigterm(runtime.stop):
        assert not stream_cache.build_streams(task, tell)
    assert done == [1, 2]
    runtime.close()
