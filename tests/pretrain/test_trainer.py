from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import FOUR_STAGES, NARROW, REPOSITORY, SHORT, small_run
from http_store import serving

from cluster.checkpoint import CheckpointStore
from data_pipeline.cache import ROOT_VARIABLE
from data_pipeline.manifest import Manifest, Split
from data_pipeline.shards import ShardReader, ShardWriter
from pretrain.run import run

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


def test_run__each_stage_changes_only_what_it_trains(scenes: Path, tmp_path: Path):
    """Parameters and statistics at the ends of the stages, part by part."""
    folder = run(small_run(scenes, tmp_path, "keep_checkpoints=100", "checkpoint_every=100"))
    store = CheckpointStore(folder / "checkpoints")
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
def test_run__killed_at_any_moment_continues_bit_for_bit(scenes: Path, tmp_path: Path):
    """SIGKILL twice, at moments of no importance; losses of the whole run equal those of an uninterrupted one."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}

    def start(folder: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "dicm", "pretrain", "small", f"data={scenes}", f"run={folder}",
                   "launcher=local", "workers=1", *FOUR_STAGES, *NARROW, *SHORT, "checkpoint_every=2", "seed=7"]  # fmt: skip
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    assert start(tmp_path / "whole").wait() == 0
    metrics = tmp_path / "killed" / "metrics.jsonl"
    for lines in (3, 6):
        process = start(tmp_path / "killed")
        while process.poll() is None:
            if metrics.is_file() and len(metrics.read_text().splitlines()) >= lines:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.05)
        assert process.wait() == -signal.SIGKILL
    assert start(tmp_path / "killed").wait() == 0
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


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


def first_stage_losses(scenes: Path, folder: Path, *extra: str) -> list[float]:
    options = ["precision=fp32", "knn_samples=0", "only=[ssl]"]
    return list(losses(run(small_run(scenes, folder, *options, *extra))).values())


def test_run__recomputed_activations_change_no_loss(scenes: Path, tmp_path: Path):
    """fairscale's checkpoint_wrapper, step by step against a run without it."""
    plain = first_stage_losses(scenes, tmp_path / "plain")
    recomputed = first_stage_losses(scenes, tmp_path / "recomputed", "activation_checkpointing=true")
    assert recomputed == pytest.approx(plain, rel=1e-5)


@pytest.mark.slow
def test_run__sharded_optimizer_and_recomputation_change_no_loss_of_two_workers(scenes: Path, tmp_path: Path):
    """fairscale's OSS and checkpoint_wrapper, step by step against plain DDP."""
    plain = first_stage_losses(scenes, tmp_path / "plain", "workers=2")
    for option in ("shard_optimizer=true", "activation_checkpointing=true"):
        changed = first_stage_losses(scenes, tmp_path / option, "workers=2", option)
        assert changed == pytest.approx(plain, rel=1e-5), option


@pytest.mark.slow
def test_run__sharded_state_goes_on_with_any_number_of_workers(scenes: Path, tmp_path: Path):
    """A run of OSS on two workers loses its last checkpoint and goes on from the one before, with two and with one."""
    options = ["precision=fp32", "knn_samples=0", "only=[redundancy]", "stages.redundancy.epochs=1",
               "checkpoint_every=2", "keep_checkpoints=9"]  # fmt: skip

    def run_on(workers: int) -> list[float]:
        sharded = "shard_optimizer=true"
        return list(losses(run(small_run(scenes, tmp_path, *options, sharded, f"workers={workers}"))).values())

    whole = run_on(2)
    for workers, tolerance in ((2, 1e-5), (1, 0.05)):  # one worker sees the same images, under other noise
        shutil.rmtree(tmp_path / "checkpoints" / "step_00000003")
        (tmp_path / "summary.json").unlink()
        again = run_on(workers)
        assert len(again) == len(whole) == 3
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


def test_run__compression_begins_as_a_klt_at_any_number_of_workers(scenes: Path, tmp_path: Path):
    def first_distortion(name: str, *options: str) -> float:
        folder = run(
            small_run(scenes, tmp_path / name, "only=[codec]", "codec.redundancy=false", "knn_samples=0", *options)
        )
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return float(rows[0]["distortion"])

    random = first_distortion("random", "stages.codec.klt=false")
    alone = first_distortion("alone")
    assert alone < 0.3 * random
    assert first_distortion("two", "workers=2") == pytest.approx(alone, rel=0.1)
