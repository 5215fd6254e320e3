from __future__ import annotations

import json
import math
import multiprocessing
import re
import shutil
import signal
import sys
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
import torch
from conftest import small_run
from http_store import serving
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))  # other processes import the functions by name

from run_functions import pretrain_each, run_without_ray

from cluster import runtime
from cluster.checkpoint import CheckpointStore
from cluster.finite import all_finite
from data_pipeline.cache import ROOT_VARIABLE
from data_pipeline.manifest import Manifest, Split
from data_pipeline.shards import ShardReader, ShardWriter
from pretrain.errors import ConfigError
from pretrain.run import run
from pretrain.trainer import RATE_WEIGHTS, dual_ascent

STAGES = ["ssl", "redundancy", "joint", "codec"]


def losses(folder: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def test_run__all_stages_leave_what_the_run_folder_promises(pretrained_run: Path):
    rows = [json.loads(line) for line in (pretrained_run / "metrics.jsonl").read_text().splitlines()]
    trained = [row for row in rows if "loss" in row]
    assert sorted({row["stage"] for row in trained}) == sorted(STAGES)
    assert [row["step"] for row in trained] == list(range(1, trained[-1]["total_steps"] + 1))
    assert all(row["images_per_second"] > 0 for row in trained)
    assert {row["stage"] for row in trained if "bpp" in row} == {"redundancy", "joint", "codec"}
    assert {row["stage"] for row in rows if "knn" in row} == set(STAGES)
    assert list((pretrained_run / "tensorboard").iterdir())
    assert list((pretrained_run / "samples").glob("guidance_*.png"))
    assert json.loads((pretrained_run / "summary.json").read_text())["streams"]["bpp"] > 0
    assert CheckpointStore(pretrained_run / "checkpoints").newest() == trained[-1]["step"]


def test_run__each_stage_changes_only_what_it_trains(pretrained_run: Path):
    """Parameters and statistics at the ends of the stages, part by part."""
    store = CheckpointStore(pretrained_run / "checkpoints")
    states = [store.load(step) for step in store.steps()]
    assert [state["progress"]["stage"] for state in states] == [0, 1, 2, 3]

    def changed(before: dict, after: dict) -> set[str]:
        return {
            key.split(".")[0]
            for key in before["codec"]
            if "quantiles" not in key
            and not torch.equal(before["codec"][key], after["codec"].get(key, before["codec"][key]))
        } - {"entropy"}

    assert changed(states[0], states[1]) == {"redundancy"}
    assert changed(states[1], states[2]) == {"backbone", "redundancy"}
    assert changed(states[2], states[3]) == {"g_a", "g_s", "h_a", "h_s"}


@pytest.mark.slow
def test_run__killed_at_any_moment_continues_bit_for_bit(pretrained_run: Path, scenes: Path, tmp_path: Path):
    """SIGKILL twice, at moments of no importance; losses of the whole run equal those of an uninterrupted one. And
    Ray is hidden: plain torch needs none."""
    config = small_run(scenes, tmp_path, "checkpoint_every=2")
    context, metrics = multiprocessing.get_context("forkserver"), tmp_path / "metrics.jsonl"

    def start() -> ForkServerProcess:
        process = context.Process(target=run_without_ray, args=(config,))
        process.start()
        return process

    for lines in (3, 6):
        process = start()
        while process.is_alive():
            if metrics.is_file() and len(metrics.read_text().splitlines()) >= lines:
                process.kill()
                break
            time.sleep(0.02)
        process.join()
        assert process.exitcode == -signal.SIGKILL
    process = start()
    process.join()
    assert process.exitcode == 0
    assert losses(tmp_path) == losses(pretrained_run)


@pytest.mark.parametrize("method", ["simsiam", "byol", "simclr"])
def test_run__every_method_trains(method: str, scenes: Path, tmp_path: Path):
    config = small_run(scenes, tmp_path, f"ssl.method={method}", "stages.ssl.epochs=0.5", "knn_samples=0")
    config.stages = config.stages[:1]
    values = losses(run(config))
    assert len(values) == 2
    assert all(value == value for value in values.values())


@pytest.mark.parametrize("heatmap", ["eigencam", "none"])
def test_run__heatmaps_by_name(heatmap: str, scenes: Path, tmp_path: Path):
    config = small_run(scenes, tmp_path, f"ssl.heatmap.method={heatmap}", "stages.ssl.epochs=0.5", "knn_samples=0")
    config.stages = config.stages[:1]
    assert losses(run(config))


def test_run__target_bpp_moves_the_weight_towards_the_target(scenes: Path, tmp_path: Path):
    """A target far above the measured rate lowers the weight of the rate, one far below raises it."""
    weights = {}
    for target in (100.0, 1e-4):
        folder = tmp_path / str(target)
        config = small_run(scenes, folder, f"stages.codec.target_bpp={target}", "knn_samples=0")
        config.stages = config.stages[-1:]
        rows = [json.loads(line) for line in (run(config) / "metrics.jsonl").read_text().splitlines()]
        weights[target] = [row["rate_weight"] for row in rows]
    assert weights[100.0] == sorted(weights[100.0], reverse=True)
    assert weights[1e-4] == sorted(weights[1e-4])
    assert weights[100.0][-1] < weights[1e-4][-1]


@pytest.mark.parametrize("where", ["step", "state"])
def test_run__one_that_diverges_ends_and_keeps_its_last_finite_checkpoint(where: str, scenes: Path, tmp_path: Path):
    """Whether a loss gives it away, or, before there is another, what is to be saved."""
    options = ["only=[ssl,codec]", "knn_samples=0", "checkpoint_every=1", "keep_checkpoints=1", "log_every=3"]
    huge = {"step": "stages.codec.lr=1e12", "state": "stages.codec.lr=1e38"}[where]
    with pytest.raises(ConfigError, match=r"stage codec: the (loss or its gradient|state)") as caught:
        run(small_run(scenes, tmp_path, *options, huge, "stages.codec.warmup=0"))
    assert str(caught.value).startswith(f"run={tmp_path}: ") and "\n" not in str(caught.value)
    assert "smaller stages.codec.lr than 1e+" in str(caught.value)
    named = re.search(r"(at|after) step (\d+).*; the checkpoint of step (\d+) is kept", str(caught.value))
    store = CheckpointStore(tmp_path / "checkpoints")
    (kept,) = store.steps()
    assert int(named[2]) == kept + 1 >= 4 and int(named[3]) == kept  # ssl has three steps
    assert all_finite(store.load(kept))
    assert not (tmp_path / "summary.json").exists()


@given(weight=st.floats(1e-9, 1e9), bpp=st.floats(), target=st.floats(1e-3, 1e3), rate=st.floats(0, 1))
def test_dual_ascent__is_a_weight_whatever_rate_was_measured(weight: float, bpp: float, target: float, rate: float):
    following = dual_ascent(weight, bpp, target, rate)
    assert RATE_WEIGHTS[0] <= following <= RATE_WEIGHTS[1]
    assert (following - weight) * (bpp - target) >= 0 or math.isnan(bpp)


FIRST_STAGE = ["precision=fp32", "knn_samples=0", "only=[ssl]"]
SHARDED = ["precision=fp32", "knn_samples=0", "only=[redundancy]", "stages.redundancy.epochs=1", "checkpoint_every=2",
           "keep_checkpoints=9", "shard_optimizer=true"]  # fmt: skip
BY_COMPRESSION = ["only=[codec]", "codec.redundancy=false", "knn_samples=0"]


def test_run__recomputed_activations_change_no_loss(scenes: Path, tmp_path: Path):
    """fairscale's checkpoint_wrapper, step by step against a run without it."""
    plain = losses(run(small_run(scenes, tmp_path / "plain", *FIRST_STAGE)))
    recomputed = losses(run(small_run(scenes, tmp_path / "recomputed", *FIRST_STAGE, "activation_checkpointing=true")))
    assert recomputed == pytest.approx(plain, rel=1e-5)


@pytest.fixture(scope="module")
def of_two_workers(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs of two workers: plain DDP, what is to change none of its losses, OSS, and compression alone."""
    folder = tmp_path_factory.mktemp("two")
    runs = {
        "plain": FIRST_STAGE,
        "shard_optimizer": [*FIRST_STAGE, "shard_optimizer=true"],
        "activation_checkpointing": [*FIRST_STAGE, "activation_checkpointing=true"],
        "sharded": SHARDED,
        "compression": BY_COMPRESSION,
    }
    configs = [small_run(scenes, folder / name, *options, "workers=2") for name, options in runs.items()]
    runtime.run(pretrain_each, configs, workers=2, launcher="local", run_dir=str(folder))
    return folder


@pytest.mark.slow
def test_run__sharded_optimizer_and_recomputation_change_no_loss_of_two_workers(of_two_workers: Path):
    """fairscale's OSS and checkpoint_wrapper, step by step against plain DDP."""
    plain = losses(of_two_workers / "plain")
    for option in ("shard_optimizer", "activation_checkpointing"):
        assert losses(of_two_workers / option) == pytest.approx(plain, rel=1e-5), option


@pytest.mark.slow
def test_run__sharded_state_goes_on_with_any_number_of_workers(scenes: Path, of_two_workers: Path, tmp_path: Path):
    """A run of OSS on two workers loses its last checkpoint and goes on from the one before, with two and with one."""
    whole = losses(of_two_workers / "sharded")
    assert len(whole) == 3
    for workers, tolerance in ((2, 1e-5), (1, 0.05)):  # one worker sees the same images, under other noise
        folder = shutil.copytree(of_two_workers / "sharded", tmp_path / str(workers))
        shutil.rmtree(folder / "checkpoints" / "step_00000003")
        (folder / "summary.json").unlink()
        again = losses(run(small_run(scenes, folder, *SHARDED, f"workers={workers}")))
        assert again == pytest.approx(whole, rel=tolerance)


def test_run__micro_batches_see_all_images(scenes: Path, tmp_path: Path):
    config = small_run(scenes, tmp_path, "accumulate=2", "knn_samples=0")
    config.stages = config.stages[1:2]
    rows = [json.loads(line) for line in (run(config) / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["samples_seen"] == 32


def test_run__data_at_a_url_changes_no_loss_and_passes_over_a_bad_image(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The same losses as from the folder, each shard fetched once, into the run's cache and no other; with an image
    that does not decode, the run goes on and names it."""
    monkeypatch.setenv(ROOT_VARIABLE, str(tmp_path / "default"))
    folder = losses(run(small_run(scenes, tmp_path / "folder", "precision=fp32", "only=[ssl]")))
    with serving(scenes) as store:
        options = ["precision=fp32", "only=[ssl]", f"shard_cache={tmp_path / 'cache'}", "shard_cache_limit=0.1"]
        config = small_run(Path("x"), tmp_path / "url", *options, f"data={store.url}")
        assert losses(run(config)) == folder
        assert {count for name, count in store.requests.items() if name.endswith(".tar")} == {1}
    assert not (tmp_path / "url" / "quarantine.jsonl").exists()
    assert len(list((tmp_path / "cache" / "shards").glob("*.tar"))) >= 1
    assert not (tmp_path / "default").exists()

    manifest = Manifest.load(scenes)
    broken = tmp_path / "broken"
    shutil.copytree(scenes, broken)
    reader = ShardReader(scenes, manifest.split("train"))
    with ShardWriter(broken, "train") as writer:
        for number in range(len(reader)):
            sample = reader.read(number)
            writer.write(
                sample | ({"png": b"broken"} if "png" in sample else {"jpg": b"broken"}) if number == 5 else sample
            )
    Manifest("broken", manifest.classes, {**manifest.splits, "train": Split(tuple(writer.shards))}).save(broken)
    rows = losses(run(small_run(broken, tmp_path / "bad", "precision=fp32", "only=[ssl]")))
    assert len(rows) == len(folder)
    named = [json.loads(line) for line in (tmp_path / "bad" / "quarantine.jsonl").read_text().splitlines()]
    assert {line["index"] for line in named} == {5}


@pytest.mark.slow
def test_run__compression_begins_as_a_klt_at_any_number_of_workers(scenes: Path, of_two_workers: Path, tmp_path: Path):
    def first_distortion(folder: Path) -> float:
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return float(rows[0]["distortion"])

    random, alone = (
        first_distortion(run(small_run(scenes, tmp_path / name, *BY_COMPRESSION, f"stages.codec.klt={klt}")))
        for name, klt in (("random", "false"), ("alone", "true"))
    )
    assert alone < 0.3 * random
    assert first_distortion(of_two_workers / "compression") == pytest.approx(alone, rel=0.1)
