"""Detection and instance segmentation, whole runs of a narrow detector on a narrow codec."""

from __future__ import annotations

import copy
import json
import math
import shutil
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import torch
from conftest import assert_refused, dicm
from PIL import Image
from small_objects import NARROW_DETECTOR, rectangles, write_eight_scenes, write_objects

from cluster.metrics import read_rows
from data_pipeline.manifest import Manifest
from data_pipeline.sources.annotations import decode_mask, encode_mask
from downstream import finetune
from downstream.errors import TaskError

FAST = ["launcher=local", "precision=fp32", "epochs=1", "batch_size=4", "log_every=1", *NARROW_DETECTOR]
OBJECT_TASKS = ("detection", "instance_segmentation")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of three sizes, one object each."""
    folder = tmp_path_factory.mktemp("data") / "rectangles"
    return write_objects(folder, {"train": rectangles(12), "val": rectangles(3, first=20)})


def options(codec: Path, data: Path, run: Path, *more: str) -> list[str]:
    return [f"codec={codec}", f"data={data}", f"run={run}", *FAST, *more]


def fine_tune(task: str, codec: Path, data: Path, run: Path, *more: str) -> dict[str, Any]:
    return finetune.run(finetune.resolve(f"{task}_small", options(codec, data, run, *more)))


@pytest.mark.slow
def test_run__eight_scenes_are_learned_by_heart(codec: Path, tmp_path: Path):
    """Measured on real streams, boxes at IoU 50:95: what is learned is what is read."""
    data = write_eight_scenes(tmp_path / "data")
    results = fine_tune("detection", codec, data, tmp_path / "run", "batch_size=8", "epochs=170", "lr=1e-3",
                        "weight_decay=0", "flip=false", "log_every=10", "checkpoint_every=1000")  # fmt: skip
    assert results["map"] >= 0.9 and results["voc_ap50"] >= 0.9
    losses = [row["loss"] for row in read_rows(tmp_path / "run" / "metrics.jsonl")]
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.parametrize("task", OBJECT_TASKS)
def test_run__images_of_unequal_sizes_and_a_resumed_run_ends_in_the_same_weights(
    task: str, codec: Path, data: Path, tmp_path: Path
):
    whole = tmp_path / "whole"
    results = fine_tune(task, codec, data, whole, "checkpoint_every=1", "keep_checkpoints=10")
    assert results["images"] == 3 and results["classes"] == ["red", "green", "blue"]
    assert 0 < results["bpp_payload"] < results["bpp"]
    assert set(results["metrics"]) <= set(results)
    again = shutil.copytree(whole, tmp_path / "again")
    (again / "results.json").unlink()
    steps = sorted((again / "checkpoints").iterdir())
    for folder in steps[1:]:
        shutil.rmtree(folder)
    resumed = fine_tune(task, codec, data, again, "checkpoint_every=1", "keep_checkpoints=10")
    states = [
        torch.load(run / "checkpoints" / steps[-1].name / "state.pt", weights_only=True) for run in (whole, again)
    ]
    assert all(torch.equal(states[0]["model"][name], tensor) for name, tensor in states[1]["model"].items())
    losses = [[row["loss"] for row in read_rows(run / "metrics.jsonl")] for run in (whole, again)]
    assert losses[0] == losses[1] and all(math.isfinite(loss) for loss in losses[0])
    assert {**resumed, "seconds": 0} == {**results, "seconds": 0}


def test_run__pixels_of_another_codec(codec: Path, data: Path, tmp_path: Path):
    results = fine_tune("detection", codec, data, tmp_path / "run", "input=pixels", "anchor=jpeg:30", "voc07=true")
    assert results["anchor"] == "jpeg:30" and 0 < results["bpp_payload"] < results["bpp"] < 24


GATES = {"dynamic": [], "variance": ["num_channels=5"], "none": []}


@pytest.mark.parametrize(("gate", "transform"), [*((gate, "deconv") for gate in GATES), ("variance", "synthesis")])
def test_run__behind_a_gate_reads_chosen_channels_of_the_latent(
    gate: str, transform: str, codec: Path, data: Path, tmp_path: Path
):
    epochs = 10 if transform == "synthesis" else 4  # it begins further away
    options = [f"gate={gate}", f"transform={transform}", f"epochs={epochs}", *GATES[gate]]
    results = fine_tune("detection", codec, data, tmp_path / "run", *options)
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    # F becomes what the backbone's head gives.
    assert fmean(row["feature_mse"] for row in rows[-3:]) < fmean(row["feature_mse"] for row in rows[:3])
    channels = {"dynamic": results["channels"], "variance": 5, "none": 32}[gate]
    assert results["channels"] == channels and 1 <= channels <= 32
    again = finetune.evaluate_run(tmp_path / "run")
    assert {**again, "seconds": 0} == {**results, "seconds": 0}


def test_run__a_static_gate_takes_the_channels_that_a_dynamic_one_chose(codec: Path, data: Path, tmp_path: Path):
    fine_tune("detection", codec, data, tmp_path / "run", "gate=dynamic")
    result = dicm("select-channels", tmp_path / "run", "--num", "6")
    assert result.returncode == 0, result.stderr
    chosen = tmp_path / "run" / "channels_6.json"
    results = fine_tune("instance_segmentation", codec, data, tmp_path / "static", "gate=static", f"channels={chosen}")
    assert results["channels"] == 6
    # The same file makes `dicm encode` put these channels into the base layer, which is all that is read.
    image = tmp_path / "image.png"
    Image.fromarray(rectangles(1)[0][0]).save(image)
    coded = dicm("encode", image, "-o", tmp_path / "streams", "--codec", codec, "--channels", chosen)
    assert coded.returncode == 0, coded.stderr
    for source, out in ((image, "a"), (tmp_path / "streams" / "image.dicm", "b")):
        run = ("instance_segmentation", tmp_path / "static", source, "-o", tmp_path / out, "--score", "0")
        assert dicm("predict", *run).returncode == 0
    one, other = (json.loads((tmp_path / out / "image.json").read_text()) for out in "ab")
    assert one["objects"] == other["objects"] and one["bytes"] < other["bytes"]


@pytest.mark.slow
def test_run__two_workers_measure_each_image_once(codec: Path, data: Path, tmp_path: Path):
    results = fine_tune("instance_segmentation", codec, data, tmp_path / "run", "workers=2")
    assert results["images"] == 3
    alone = finetune.evaluate_run(tmp_path / "run")
    assert {key: alone[key] for key in alone if key != "seconds"} == {
        key: results[key] for key in results if key != "seconds"
    }


def spoiled(count: int) -> list[tuple[np.ndarray, dict[str, Any]]]:
    """Images with everything wrong that is made good, each fault once."""
    samples = copy.deepcopy(rectangles(count))
    facts = [facts for _, facts in samples]
    facts[0]["boxes"][0] = [-30, -30, facts[0]["boxes"][0][2], 900]
    facts[1]["boxes"][0] = [5, 5, 5, 30]
    facts[2]["labels"][0] = 7
    facts[3] |= {"boxes": [], "labels": [], "masks": [], "iscrowd": [], "difficult": []}
    facts[4]["masks"][0] = encode_mask(np.ones((8, 8), np.uint8))
    facts[5]["masks"][0]["counts"] += "zz1"
    facts[6]["iscrowd"] = [1]
    del facts[7]["boxes"]
    del facts[8]["masks"]
    samples[9] = (np.zeros((12, 40, 3), np.uint8), {"width": 40, "height": 12, "boxes": [[1, 1, 9, 9]], "labels": [0]})
    return samples


@pytest.mark.parametrize("task", OBJECT_TASKS)
def test_run__what_is_wrong_is_left_out_with_a_count(task: str, codec: Path, tmp_path: Path):
    data = write_objects(tmp_path / "data", {"train": spoiled(14), "val": spoiled(14)})
    result = dicm("finetune", f"{task}_small", *options(codec, data, tmp_path / "run", "batch_size=3"))
    assert result.returncode == 0, result.stderr
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    counts = {
        "box cut to the image": 1, "box without area in the image": 1, "object of unknown class": 1,
        "image without boxes": 1, "image smaller than 16 pixels": 1, "crowd (iscrowd 1), of which nothing is learned": 1,
    }  # fmt: skip
    background = 3  # without any object, without one that has an area, without one of a known class
    if task == "instance_segmentation":
        counts |= {"object whose mask is damaged or of another size": 2, "image without a mask for each box": 1}
        background += 2
    counts["image without objects, kept as background"] = background
    assert results["left_out"] == {f"{split}: {name}": count for split in ("train", "val") for name, count in counts.items()} | results["left_out"]  # fmt: skip
    assert len(results["left_out"]) == 2 * len(counts)
    assert results["images"] == (11 if task == "instance_segmentation" else 12)
    assert "1 x train: object of unknown class" in result.stdout
    assert all(math.isfinite(row["loss"]) for row in read_rows(tmp_path / "run" / "metrics.jsonl"))


def test_run__data_without_what_the_task_needs_is_refused(codec: Path, data: Path, colours: Path, tmp_path: Path):
    def refused(task: str, root: Path, *words: str, more: tuple[str, ...] = ()) -> None:
        assert_refused(dicm("finetune", f"{task}_small", *options(codec, root, tmp_path / "run", *more)), *words)

    refused("detection", colours, "train split has boxes", "48 x image without boxes", "dicm data build voc")
    without_masks = copy.deepcopy(rectangles(8))
    for _, facts in without_masks:
        del facts["masks"]
    root = write_objects(tmp_path / "boxes", {"train": without_masks, "val": without_masks})
    refused("instance_segmentation", root, "boxes and masks", "8 x image without a mask", "dicm data build coco")
    manifest = Manifest.load(data)
    for name, changed, word in (
        ("no_val", Manifest("x", manifest.classes, {"train": manifest.split("train")}), "no val split"),
        ("no_classes", Manifest("x", (), manifest.splits), "names no classes"),
    ):
        folder = shutil.copytree(data, tmp_path / name)
        changed.save(folder)
        refused("detection", folder, word)
    refused("detection", data, "batch_size=40", "12 training samples", more=("batch_size=40",))
    refused("detection", data, "anchors=", "5 sides", more=("anchors=[8,16]",))
    refused("detection", data, "max_side=20", "64", more=("max_side=20",))
    assert not (tmp_path / "run").exists()


def test_run__a_loss_that_is_no_number_ends_the_run_in_one_line(codec: Path, data: Path, tmp_path: Path):
    result = dicm("finetune", "detection_small", *options(codec, data, tmp_path / "run", "lr=1e30", "epochs=4"))
    assert_refused(result, "smaller lr")


def task_of(name: str, codec: Path, data: Path, run: Path, *more: str):
    tuner = finetune.create_tuner(finetune.resolve(f"{name}_small", options(codec, data, run, *more)))
    tuner.enter(tuner.stages[0])
    return tuner.task


def test_target__crowds_and_difficult_objects_are_not_learned(codec: Path, tmp_path: Path):
    samples = copy.deepcopy(rectangles(4))
    samples[1][1]["iscrowd"], samples[2][1]["difficult"] = [1], [True]
    data = write_objects(tmp_path / "data", {"train": samples, "val": samples})
    task = task_of("detection", codec, data, tmp_path / "run")
    assert [len(task._target(task.dataset("train")[k])["boxes"]) for k in range(4)] == [1, 0, 0, 1]
    assert task.found.details["train"].found == 2


def test_begin__statistics_are_those_of_the_training_images_without_padding(codec: Path, data: Path, tmp_path: Path):
    task = task_of("detection", codec, data, tmp_path / "run")
    task.begin()
    features = [task.source.features(task.dataset("train")[k].image[None])[0] for k in range(12)]
    size = [min(one.shape[axis] for one in features) for axis in (-2, -1)]
    cut = torch.stack([one[:, : size[0], : size[1]] for one in features])
    # A batch of 16 takes some of the 12 images twice.
    assert torch.allclose(
        task.model.pyramid.norms[0].running_mean, cut.mean(dim=(0, 2, 3)), atol=0.3 * float(cut.std())
    )


def test_resolve__another_task_in_the_options_is_refused():
    with pytest.raises(TaskError, match=r"task=detection contradicts"):
        finetune.resolve("classification", ["codec=c", "data=d", "task=detection"])


def test_predict__masks_are_rle_of_the_images_size(codec: Path, data: Path, tmp_path: Path):
    task = task_of("instance_segmentation", codec, data, tmp_path / "run")
    image = task.dataset("val")[1].image
    features, _, _ = task.source.through_streams(image[None])
    height, width = image.shape[-2:]
    found = task.predict(features, height, width)["objects"]
    assert found and json.loads(json.dumps(found)) == found
    for item in found:
        assert item["class"] in ("red", "green", "blue") and 0 <= item["score"] <= 1
        assert decode_mask(item["mask"], width, height).shape == (height, width)
    drawn = task.draw(image, {"objects": found}, 0.0)
    assert drawn.shape == image.shape and not torch.equal(drawn, image)
    assert torch.equal(task.draw(image, {"objects": found}, 1.0), image)
