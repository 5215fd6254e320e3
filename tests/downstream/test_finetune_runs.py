"""Whole runs on images whose class is their colour."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from conftest import dicm
from http_store import serving

from cluster.checkpoint import CheckpointStore
from cluster.finite import all_finite
from data_pipeline.manifest import Manifest, Split
from data_pipeline.shards import ShardReader, ShardWriter
from downstream.errors import StoppedError, TaskError
from downstream.finetune import evaluate_run, resolve, run
from pretrain.codec.feature_codec import FeatureCodec

Options = list[str]


def test_run__learns_from_streams(finetuned: Path):
    results = json.loads((finetuned / "results.json").read_text())
    assert results["top1"] > 0.6  # chance is a third
    assert results["top5"] == 1
    assert results["classes"] == ["red", "green", "blue"]


@pytest.mark.parametrize("extra", [["probe=true"], ["input=pixels", "anchor=jpeg:20"]], ids=["probe", "jpeg"])
def test_run__learns_in_every_mode(extra: Options, codec_folder: Path, colours: Path, tmp_path: Path, options):
    results = run(resolve("classification", options(codec_folder, colours, tmp_path / "run", *extra)))
    assert results["top1"] > 0.6


def test_run__a_batch_that_micro_batches_do_not_divide(codec_folder: Path, colours: Path, tmp_path: Path, options):
    """Of 12 images, 11 would leave one alone, which has no variance for a batch norm."""
    words = options(codec_folder, colours, tmp_path / "run", "epochs=1", "micro_batch=11")
    assert run(resolve("classification", words))["images"] == 18


def test_run__complete_run_is_left_alone_and_other_options_are_refused(
    codec_folder: Path, colours: Path, finetuned: Path, options
):
    before = (finetuned / "metrics.jsonl").read_bytes()
    run(resolve("classification", options(codec_folder, colours, finetuned)))
    assert (finetuned / "metrics.jsonl").read_bytes() == before
    with pytest.raises(TaskError, match=r"lr: 0.02 there, 0.5 here"):
        run(resolve("classification", options(codec_folder, colours, finetuned, "lr=0.5")))


def test_run__an_image_without_a_label_is_named(codec_folder: Path, colours: Path, tmp_path: Path, options):
    data = shutil.copytree(colours, tmp_path / "data")
    manifest = Manifest.load(data)
    reader = ShardReader(colours, manifest.split("train"))
    with ShardWriter(data, "train") as writer:
        for number in range(len(reader)):
            label = {} if number == 7 else {"label": number % 3}
            writer.write({"__key__": str(number), "png": reader.read(number)["png"], "json": label})
    Manifest("gap", manifest.classes, {**manifest.splits, "train": Split(tuple(writer.shards))}).save(data)
    with pytest.raises(TaskError, match="image 7 has no label"):
        run(resolve("classification", options(codec_folder, data, tmp_path / "run")))


def test_run__one_that_diverges_saves_nothing_that_is_not_finite(
    codec_folder: Path, colours: Path, tmp_path: Path, options
):
    """Found when it would save, long before the next row of metrics."""
    words = options(codec_folder, colours, tmp_path, "lr=1e30", "checkpoint_every=1", "log_every=100")
    with pytest.raises(TaskError, match=r"step \d+.*; .* smaller lr than 1e\+30"):
        run(resolve("classification", words))
    store = CheckpointStore(tmp_path / "checkpoints")
    assert all(all_finite(store.load(step)) for step in store.steps())


def test_evaluate__unfinished_run_is_refused_and_gets_no_results(finetuned: Path, tmp_path: Path):
    """Results of half a run would make the next `dicm finetune` take it for complete."""
    folder = shutil.copytree(finetuned, tmp_path / "run")
    (folder / "results.json").unlink()
    with pytest.raises(TaskError, match="not complete"):
        evaluate_run(folder)
    assert not (folder / "results.json").exists()


def test_evaluate__measures_again_and_finds_the_same(finetuned: Path, tmp_path: Path):
    results = json.loads((finetuned / "results.json").read_text())
    folder = shutil.copytree(finetuned, tmp_path / "run")
    (folder / "results.json").write_text(json.dumps({**results, "top1": 2.0, "top5": 2.0, "bpp": 2.0}))
    assert dicm("evaluate", folder).returncode == 0
    again = json.loads((folder / "results.json").read_text())
    assert all(again[name] == results[name] for name in ("top1", "top5", "bpp"))


def test_evaluate__folder_that_is_no_run(tmp_path: Path):
    with pytest.raises(TaskError, match=r"not a run folder"):
        evaluate_run(tmp_path)


def test_run__data_at_a_url_gives_the_results_of_the_folder(
    codec_folder: Path, colours: Path, finetuned: Path, tmp_path: Path, options
):
    """The run of `finetuned` again, through the cache; evaluating it again goes through it too."""
    with serving(colours) as store:
        results = run(
            resolve(
                "classification", options(codec_folder, store.url, tmp_path / "run", f"shard_cache={tmp_path}/cache")
            )
        )
        local = json.loads((finetuned / "results.json").read_text())
        assert {key: results[key] for key in ("top1", "top5", "bpp", "images")} == {
            key: local[key] for key in ("top1", "top5", "bpp", "images")
        }
        assert results["data"] == store.url
        assert evaluate_run(tmp_path / "run")["top1"] == local["top1"]
        assert {count for name, count in store.requests.items() if name.endswith(".tar")} == {1}


def test_run__another_codec_or_data_set_in_the_place_of_the_runs_is_refused(
    codec_folder: Path, colours: Path, tmp_path: Path, options
):
    """Paths are the same; what lies there is not."""
    codec, data = shutil.copytree(codec_folder, tmp_path / "codec"), shutil.copytree(colours, tmp_path / "data")
    overrides = options(codec, data, tmp_path / "run")
    run(resolve("classification", overrides))
    results = (tmp_path / "run" / "results.json").read_bytes()
    torch.manual_seed(1)
    changed = FeatureCodec(FeatureCodec.from_pretrained(codec).config).eval()
    changed.save_pretrained(codec, extra={"image_size": 64, "canvas_size": 64})
    for again in (lambda: run(resolve("classification", overrides)), lambda: evaluate_run(tmp_path / "run")):
        with pytest.raises(TaskError, match=r"its codec is another one now"):
            again()
    shutil.rmtree(codec)
    shutil.copytree(codec_folder, codec)
    manifest = Manifest.load(data)
    Manifest("renamed", manifest.classes, manifest.splits).save(data)
    with pytest.raises(TaskError, match=r"its data is another one now"):
        run(resolve("classification", overrides))
    assert (tmp_path / "run" / "results.json").read_bytes() == results


def test_run__options_that_could_not_work_do_not_bar_the_run_folder(
    codec_folder: Path, colours: Path, tmp_path: Path, options
):
    for wrong, word in (("rate=0.5", "one rate"), ("classes=[a]", "classes"), ("data=nowhere", "nowhere")):
        with pytest.raises(ValueError, match=word):
            run(resolve("classification", options(codec_folder, colours, tmp_path / "run", wrong)))
    assert run(resolve("classification", options(codec_folder, colours, tmp_path / "run", "epochs=1")))["images"] == 18


def test_run__a_place_where_no_folder_can_be(codec_folder: Path, colours: Path, tmp_path: Path, options):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"run=.*file/x: cannot be written"):
        run(resolve("classification", options(codec_folder, colours, tmp_path / "file" / "x")))


def test_evaluate__damaged_results_are_named(finetuned: Path, tmp_path: Path):
    folder = shutil.copytree(finetuned, tmp_path / "run")
    (folder / "results.json").write_text("{")
    with pytest.raises(TaskError, match=r"results.json: cannot be read"):
        evaluate_run(folder)


def test_run__damaged_checkpoints_are_an_earlier_runs_too(
    codec_folder: Path, colours: Path, finetuned: Path, tmp_path: Path, options
):
    """Neither begun anew, nor taken over by a run with other options."""
    folder = shutil.copytree(finetuned, tmp_path / "run")
    (folder / "results.json").unlink()  # as if it had not come that far
    for path in folder.rglob("state.pt"):
        os.truncate(path, 1000)
    before = {name: (folder / name).read_bytes() for name in ("config.yaml", "metrics.jsonl")}
    for more in ([], ["lr=0.5"], [f"checkpoints={tmp_path}/elsewhere"]):
        with pytest.raises(ValueError, match=r"none of the \d checkpoints there can be used"):
            run(resolve("classification", options(codec_folder, colours, folder, *more)))
    assert before == {name: (folder / name).read_bytes() for name in before}


def test_finetune__told_to_stop_ends_well_and_the_same_command_continues(
    codec_folder: Path, colours: Path, tmp_path: Path, options
):
    """As a stopped pretraining does: a scheduler must not take it for a failure, nor a sweep for results."""
    folder = tmp_path / "[red]"  # what looks like markup is shown as it is

    def stop(_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    words = options(codec_folder, colours, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cluster.metrics.StepMeter.data_arrived", stop)
        result = dicm("finetune", "classification", *words)
        assert result.returncode == 0, result.stderr
        assert result.stdout == f"stopped with a checkpoint in {folder}; the same command continues\n"
        with pytest.raises(StoppedError):
            run(resolve("classification", words))
    assert not (folder / "results.json").exists()
    result = dicm("finetune", "classification", *words)
    assert result.returncode == 0 and "[red]" in result.stdout
    assert (folder / "results.json").is_file()
