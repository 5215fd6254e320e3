from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import assert_refused, dicm

from data_pipeline.manifest import Manifest
from downstream import finetune
from pretrain.codec.feature_codec import FeatureCodec

FAST = ["launcher=local", "epochs=1", "batch_size=16", "log_every=1", "precision=fp32"]


def options(codec: Path, data: Path, run: Path, *more: str) -> list[str]:
    return [f"codec={codec}", f"data={data}", f"run={run}", *FAST, *more]


def fine_tune(codec: Path, data: Path, run: Path, *more: str) -> dict:
    return finetune.run(finetune.resolve("classification", options(codec, data, run, *more)))


def test_run__measures_on_real_streams_and_leaves_the_codec_as_it_was(
    exported_codec: Path, scenes: Path, tmp_path: Path
):
    before = {path.name: path.read_bytes() for path in exported_codec.iterdir()}
    image = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    stream = FeatureCodec.from_pretrained(exported_codec).encode(image)
    results = fine_tune(exported_codec, scenes, tmp_path / "run")
    assert {path.name: path.read_bytes() for path in exported_codec.iterdir()} == before
    assert FeatureCodec.from_pretrained(exported_codec).encode(image) == stream
    assert results["images"] == 16
    assert 0 <= results["top1"] <= results["top5"] <= 1
    assert 0 < results["bpp_payload"] < results["bpp"]


def test_frozen_codec__nothing_of_it_changes_while_a_task_trains(exported_codec: Path, scenes: Path, tmp_path: Path):
    config = finetune.resolve(
        "classification", options(exported_codec, scenes, tmp_path, "image_size=64", "canvas_size=64")
    )
    tuner = finetune.create_tuner(config)
    tuner.enter(tuner.stages[0])
    before = {name: tensor.clone() for name, tensor in tuner.task.source.codec.state_dict().items()}
    tail = {name: tensor.clone() for name, tensor in tuner.model.tail.state_dict().items()}
    tuner.train()
    assert all(torch.equal(tensor, before[name]) for name, tensor in tuner.task.source.codec.state_dict().items())
    assert any(not torch.equal(tensor, tail[name]) for name, tensor in tuner.model.tail.state_dict().items())


def test_run__probe_trains_the_head_alone(exported_codec: Path, scenes: Path, tmp_path: Path):
    results = fine_tune(exported_codec, scenes, tmp_path / "run", "probe=true")
    assert results["probe"]
    state = torch.load(next((tmp_path / "run" / "checkpoints").rglob("state.pt")), weights_only=True)["model"]
    codec = FeatureCodec.from_pretrained(exported_codec)
    assert torch.equal(state["tail.0.0.conv1.weight"], codec.backbone.layer2[0].conv1.weight)
    assert state["head.weight"].abs().sum() > 0


@pytest.mark.parametrize("anchor", ["jpeg:10", None])
def test_run__pixels_of_another_codec(anchor: str | None, exported_codec: Path, scenes: Path, tmp_path: Path):
    extra = ["input=pixels"] + ([f"anchor={anchor}"] if anchor else [])
    results = fine_tune(exported_codec, scenes, tmp_path / "run", *extra)
    assert results["bpp"] == 24 if anchor is None else 0 < results["bpp"] < 24


def test_run__stopped_run_continues_to_the_same_weights(exported_codec: Path, scenes: Path, tmp_path: Path):
    """A run whose end is taken away, back to its first checkpoint, ends in the same weights when run again."""
    whole = tmp_path / "whole"
    fine_tune(exported_codec, scenes, whole, "checkpoint_every=1", "keep_checkpoints=10")
    again = shutil.copytree(whole, tmp_path / "again")
    (again / "results.json").unlink()
    steps = sorted((again / "checkpoints").iterdir())
    for folder in steps[1:]:
        shutil.rmtree(folder)
    fine_tune(exported_codec, scenes, again, "checkpoint_every=1", "keep_checkpoints=10")
    states = [
        torch.load(run / "checkpoints" / steps[-1].name / "state.pt", weights_only=True) for run in (whole, again)
    ]
    assert all(torch.equal(states[0]["model"][name], tensor) for name, tensor in states[1]["model"].items())


def test_finetune__bad_input(exported_codec: Path, scenes: Path, tmp_path: Path):
    def refused(*words: str, data: Path = scenes, codec: Path = exported_codec, more: tuple[str, ...] = ()) -> None:
        arguments = options(codec, data, tmp_path / "run", *more)
        assert_refused(dicm("finetune", "classification", *arguments), *words)

    refused(str(tmp_path / "nowhere"), data=tmp_path / "nowhere")
    refused(str(tmp_path / "nothing"), codec=tmp_path / "nothing")
    refused("batch_size=4096", more=("batch_size=4096",))
    refused("anchor", "input=pixels", more=("anchor=jpeg:3",))
    refused("epoch", "epochs", more=("epoch=3",))
    assert_refused(
        dicm("finetune", "clasification", *options(exported_codec, scenes, tmp_path / "run")), "classification"
    )

    manifest = Manifest.load(scenes)
    unlabelled = shutil.copytree(scenes, tmp_path / "unlabelled")
    Manifest(manifest.name, (), manifest.splits).save(unlabelled)
    refused("no labels", data=unlabelled)
    without_val = shutil.copytree(scenes, tmp_path / "without_val")
    Manifest(manifest.name, manifest.classes, {"train": manifest.splits["train"]}).save(without_val)
    refused("no val split", data=without_val)
    assert not (tmp_path / "run").exists()


def test_run__codec_of_another_configuration_is_refused(exported_codec: Path, scenes: Path, tmp_path: Path):
    folder = shutil.copytree(exported_codec, tmp_path / "codec")
    facts = json.loads((folder / "config.json").read_text())
    facts["config"]["latent_channels"] = 32
    (folder / "config.json").write_text(json.dumps(facts))
    result = dicm("finetune", "classification", *options(folder, scenes, tmp_path / "run"))
    assert_refused(result, str(folder), "another configuration")


def test_run__micro_batches_learn_what_the_batch_does(exported_codec: Path, scenes: Path, tmp_path: Path):
    """A probe, whose features have no batch statistics: the gradients add up to those of the whole batch."""
    weights = []
    for name, more in (("whole", []), ("parts", ["micro_batch=5"])):
        fine_tune(exported_codec, scenes, tmp_path / name, "probe=true", *more)
        newest = sorted((tmp_path / name / "checkpoints").rglob("state.pt"))[-1]
        weights.append(torch.load(newest, weights_only=True)["model"]["head.weight"])
    assert torch.allclose(weights[0], weights[1], atol=1e-5)
    assert weights[0].abs().sum() > 0
