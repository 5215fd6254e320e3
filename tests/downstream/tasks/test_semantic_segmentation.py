from __future__ import annotations

import copy
import io
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import assert_refused, dicm
from PIL import Image
from small_codecs import create_codec, random_images
from small_objects import SMALL_CROPS
from torch import Tensor

from cluster.metrics import read_rows
from data_pipeline.sources.annotations import decode_mask
from downstream import finetune
from downstream.channels import most_varied
from downstream.errors import TaskError
from downstream.evaluation.segmentation import SegmentationMetric, class_scores, constant_scores, scores
from downstream.gate import Gate, create_gate
from downstream.latents import FeatureLatents
from downstream.predict import predict_files
from downstream.tasks.deeplab import DeepLab
from downstream.tasks.latent_input import feature_distance
from downstream.tasks.segmentation_network import SegmentationNetwork, segmentation_loss
from downstream.transform import TRANSFORMS

GATE_CHOICES = {"dynamic": None, "static": [1, 4, 20], "variance": [0, 31], "none": None}


@pytest.fixture(scope="module")
def latents() -> FeatureLatents:
    return FeatureLatents(create_codec(), torch.device("cpu"))


@pytest.fixture(scope="module")
def teacher() -> DeepLab:
    torch.manual_seed(0)
    return DeepLab("resnet18", 5).eval().requires_grad_(False)


def network_of(gate: Gate, kind: str, teacher: DeepLab, latents: FeatureLatents) -> SegmentationNetwork:
    """A student whose tail is the teacher's, as it is when training begins."""
    return SegmentationNetwork(gate, kind, copy.deepcopy(teacher).requires_grad_(True), latents.codec.g_s)


@pytest.mark.parametrize("kind", TRANSFORMS)
@pytest.mark.parametrize("gate", GATE_CHOICES)
def test_network__of_a_stream_is_that_of_training(gate: str, kind: str, latents: FeatureLatents, teacher: DeepLab):
    """The logits that a receiver computes from the base alone are those of the gated latent."""
    torch.manual_seed(0)
    network = network_of(create_gate(gate, 32, GATE_CHOICES[gate]), kind, teacher, latents).eval()
    image = random_images(1, 70, 100)[0]
    with torch.no_grad():
        logits, features = network(latents.latents(image[None]), 70, 100)
        stream = latents.encode(image, network.input.gate.choice, rest=True)
        received = latents.receive(stream if network.input.gate.choice is None else latents.split(stream)[0])
        assert torch.allclose(network.from_base(received), logits, atol=1e-3)
        # A stream that carries everything serves, too: the gate takes its channels from it.
        assert torch.allclose(network.from_base(latents.receive(latents.encode(image))), logits, atol=1e-3)
    assert logits.shape == (1, 5, 70, 100) and features.shape == (1, 64, 18, 25)
    assert features.shape == teacher.head(torch.randn(1, 3, 70, 100)).shape


def test_network__refuses_a_stream_of_other_channels(latents: FeatureLatents, teacher: DeepLab):
    network = network_of(create_gate("static", 32, [1, 2, 3]), "deconv", teacher, latents).eval()
    received = latents.receive(latents.encode(random_images(1, 64, 64)[0], [1, 2]))
    with pytest.raises(TaskError, match=r"carries 2 channels \(1, 2\), this network reads 3 channels \(1, 2, 3\)"):
        network.from_base(received)


@pytest.mark.parametrize("kind", TRANSFORMS)
def test_network__trains_gate_transform_and_tail_and_leaves_codec_and_teacher(
    kind: str, latents: FeatureLatents, teacher: DeepLab
):
    torch.manual_seed(0)
    network = network_of(create_gate("dynamic", 32), kind, teacher, latents).train()
    frozen = {**latents.codec.state_dict(), **{f"teacher.{k}": v for k, v in teacher.state_dict().items()}}
    before = {name: tensor.clone() for name, tensor in frozen.items()}
    images = random_images(2, 64, 64)
    logits, features = network(latents.latents(images), 64, 64)
    target = teacher.head(torch.randn(2, 3, 64, 64))
    (segmentation_loss(logits, torch.zeros(2, 64, 64).long()) + feature_distance(features, target)).backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in network.input.gate.parameters())
    assert all(p.grad is not None for p in network.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in frozen.items())


def test_loss__is_cross_entropy_and_the_distance_of_features():
    logits, masks = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 4, 4))
    masks[0, 0] = 255
    features, target = torch.randn(2, 6, 1, 1), torch.randn(2, 6, 1, 1)
    count = masks != 255
    expected = -logits.log_softmax(1).permute(0, 2, 3, 1)[count].gather(1, masks[count][:, None]).mean()
    assert torch.allclose(segmentation_loss(logits, masks), expected)
    assert torch.allclose(feature_distance(features, target), (features - target).square().mean())
    # A crop that lies outside of what was annotated must not end a training with NaN.
    assert float(segmentation_loss(logits, torch.full_like(masks, 255))) == 0


def test_metric__ignores_255_and_averages_over_classes_that_occur():
    metric = SegmentationMetric(4)
    truth = torch.tensor([[[0, 0, 0, 1], [1, 255, 255, 2]]])
    predicted = torch.tensor([[[0, 0, 1, 1], [1, 3, 0, 1]]])
    metric.update(predicted, truth)
    assert metric.confusion().sum() == 6
    results = scores(metric.confusion())
    assert class_scores(metric.confusion()) == pytest.approx([2 / 3, 2 / 4, 0, None])
    assert results["miou"] == pytest.approx((2 / 3 + 2 / 4 + 0) / 3)  # class 3 occurs only where nothing counts
    assert results["pixel_accuracy"] == pytest.approx(4 / 6)


def test_metric__gathers_over_parts():
    random = torch.Generator().manual_seed(0)
    truth, predicted = (torch.randint(0, 4, (6, 8, 8), generator=random) for _ in range(2))
    whole, parts = SegmentationMetric(4), [SegmentationMetric(4), SegmentationMetric(4)]
    whole.update(predicted, truth)
    for part, half in zip(parts, (slice(0, 3), slice(3, 6)), strict=True):
        part.update(predicted[half], truth[half])
    assert scores(parts[0].confusion() + parts[1].confusion()) == scores(whole.confusion())


def test_constant_scores__are_those_of_the_most_frequent_class():
    confusion = torch.tensor([[5.0, 0, 0], [1, 1, 1], [0, 0, 2]])
    assert constant_scores(confusion) == {
        "miou": pytest.approx(5 / 10 / 3),
        "pixel_accuracy": pytest.approx(0.5),
    }
    assert scores(torch.zeros(3, 3)) == {"miou": None, "pixel_accuracy": None}


def perfect(masks: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(masks, 3).permute(0, 3, 1, 2).float()


def test_metric__perfect_is_one():
    metric, masks = SegmentationMetric(3), torch.randint(0, 3, (2, 8, 8))
    metric.update(perfect(masks).argmax(1), masks)
    assert scores(metric.confusion()) == {"miou": 1.0, "pixel_accuracy": 1.0}


def options(codec: Path, data: Path, run: Path, *more: str) -> list[str]:
    return [f"codec={codec}", f"data={data}", f"run={run}", "launcher=local", "precision=fp32", "epochs=2",
            "transform_epochs=1", "log_every=1", "keep_checkpoints=20", "checkpoint_every=1", *SMALL_CROPS, *more]  # fmt: skip


def fine_tune(codec: Path, data: Path, run: Path, *more: str) -> dict[str, Any]:
    return finetune.run(finetune.resolve("semantic_segmentation_small", options(codec, data, run, *more)))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with twelve scenes and a codec."""
    from data_pipeline.scenes import write_scenes

    folder = tmp_path_factory.mktemp("segmentation")
    write_scenes(folder / "scenes", train=8, val=4, size=64, seed=0)
    create_codec(backbone="test_resnet").save_pretrained(folder / "codec")
    return folder


@pytest.fixture(scope="module")
def trained(place: Path) -> Path:
    """A complete run with a dynamic gate."""
    fine_tune(place / "codec", place / "scenes", place / "run")
    return place / "run"


def results_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "results.json").read_text())


def test_run__trains_a_teacher_then_a_transform_and_then_a_student(trained: Path):
    rows = read_rows(trained / "metrics.jsonl")
    assert [row["stage"] for row in rows] == ["teacher"] * 2 + ["transform"] * 2 + ["student"] * 4
    assert rows[2]["loss"] == rows[2]["feature_mse"] > rows[3]["feature_mse"]
    assert rows[4]["feature_mse"] < rows[2]["feature_mse"]  # the student begins with what the transform has learned
    assert rows[-1]["loss"] == pytest.approx(rows[-1]["cross_entropy"] + rows[-1]["feature_mse"])
    results = results_of(trained)
    assert 0 <= results["miou"] <= results["pixel_accuracy"] <= 1 and results["images"] == 4
    assert results["gate"] == "dynamic" and 1 <= results["channels"] <= 32
    assert results["classes"][0] == "background" and set(results["class_iou"]) == set(results["classes"])


def test_run__evaluates_the_bytes_of_real_streams_with_the_chosen_channels(trained: Path):
    tuner = finetune.open_run(trained)
    task, results = tuner.task, results_of(trained)
    again = task.evaluate()
    assert {key: results[key] for key in again} == again
    streams = [task.source.encode(task.dataset("val")[k].image, task.model.input.gate.choice) for k in range(4)]
    assert results["bpp"] == pytest.approx(8 * sum(map(len, streams)) / (4 * 64 * 64))
    infos = [task.source.codec.describe(stream) for stream in streams]
    assert all(list(info.layers) == ["base"] for info in infos)
    # What is chosen differs from image to image: it is no header that can be agreed upon.
    payload = sum(info.layers["base"] + len(info.channels.pack()) for info in infos)
    assert results["bpp_payload"] == pytest.approx(8 * payload / (4 * 64 * 64))


@pytest.mark.parametrize("step", [1, 2, 3, 4, 5])
def test_run__a_resumed_run_ends_in_the_same_weights(step: int, trained: Path, place: Path, tmp_path: Path):
    """Cut within the stages of teacher, transform and student, and between them."""
    again = shutil.copytree(trained, tmp_path / "again")
    (again / "results.json").unlink()
    if step == 1:
        (again / "teacher.pt").unlink()
    if step < 4:
        (again / "transform.pt").unlink()
    for folder in sorted((again / "checkpoints").iterdir())[step:]:
        shutil.rmtree(folder)
    resumed = fine_tune(place / "codec", place / "scenes", again)
    assert {**resumed, "seconds": 0} == {**results_of(trained), "seconds": 0}
    states = [torch.load(run / "checkpoints" / "step_00000008" / "state.pt", weights_only=True)["model"]
              for run in (trained, again)]  # fmt: skip
    assert all(torch.equal(states[0][name], tensor) for name, tensor in states[1].items())


@pytest.mark.slow
def test_run__two_workers_of_ray_count_each_image_once(trained: Path, place: Path, tmp_path: Path):
    results = fine_tune(
        place / "codec",
        place / "scenes",
        tmp_path / "run",
        "workers=2",
        "launcher=ray",
        f"teacher={trained / 'teacher.pt'}",
    )
    assert results["images"] == 4
    alone = finetune.evaluate_run(tmp_path / "run")
    assert {**alone, "seconds": 0} == {**results, "seconds": 0}


def test_run__a_teacher_serves_other_runs_and_pixels(trained: Path, place: Path, tmp_path: Path):
    teacher = f"teacher={trained / 'teacher.pt'}"
    codec, data = place / "codec", place / "scenes"
    static = fine_tune(codec, data, tmp_path / "v", teacher, "gate=variance", "num_channels=4", "transform=res")
    assert static["channels"] == 4
    tuner = finetune.open_run(tmp_path / "v")
    images = [tuner.task.dataset("train")[k].image for k in range(8)]
    _, size, payload = tuner.task.through_stream(images[0])
    info = tuner.task.source.codec.describe(tuner.task.stream_of(images[0]))
    assert (size, payload) == (info.header_bytes + info.layers["base"], info.layers["base"])
    assert tuner.task.model.input.gate.choice == most_varied(tuner.task.source, images, 4)
    pixels = fine_tune(codec, data, tmp_path / "p", teacher, "input=pixels", "anchor=jpeg:30", "epochs=1")
    assert pixels["anchor"] == "jpeg:30" and pixels["channels"] is None
    assert 0 < pixels["bpp_payload"] < pixels["bpp"] < 24


def test_run__latents_of_a_compressai_model(place: Path, tmp_path: Path):
    from compressai.zoo import image_models
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = image_models["bmshj2018-hyperprior"](quality=1).requires_grad_(False)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, tmp_path / "w.safetensors")
    latents = ["latents=bmshj2018-hyperprior", f"latents_weights={tmp_path / 'w.safetensors'}", "backbone=test_resnet"]
    overrides = options(place / "codec", place / "scenes", tmp_path / "run", "epochs=1", *latents)[1:]
    results = finetune.run(finetune.resolve("semantic_segmentation_small", overrides))
    assert results["codec"] is None and results["latents"] == "bmshj2018-hyperprior"
    assert 1 <= results["channels"] <= 192
    image = tmp_path / "noise.png"
    Image.fromarray(random_images(1, 64, 64)[0].permute(1, 2, 0).numpy()).save(image)
    assert predict_files("semantic_segmentation", tmp_path / "run", [image], tmp_path / "out").num_files == 1
    model.g_a[0].weight.mul_(2)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, tmp_path / "w.safetensors")
    with pytest.raises(TaskError, match="latents_weights is another one now"):
        predict_files("semantic_segmentation", tmp_path / "run", [image], tmp_path / "out")


def test_run__no_epochs_measure_the_network_of_another_run_and_keep_it(trained: Path, place: Path, tmp_path: Path):
    """Nothing is trained, no teacher either; what predicts is the network that was measured."""
    run = tmp_path / "run"
    results = fine_tune(place / "codec", place / "scenes", run, f"init={trained}", "epochs=0")
    assert {key: results[key] for key in ("miou", "bpp", "channels")} == {
        key: results_of(trained)[key] for key in ("miou", "bpp", "channels")
    }
    assert read_rows(run / "metrics.jsonl") == [] and not (run / "teacher.pt").exists()
    image = tmp_path / "noise.png"
    Image.fromarray(random_images(1, 64, 64)[0].permute(1, 2, 0).numpy()).save(image)
    found = []
    for folder in (trained, run):
        predict_files("semantic_segmentation", folder, [image], tmp_path / "out")
        found.append(json.loads((tmp_path / "out" / "noise.json").read_text()))
    assert found[0] == found[1]


def test_run__a_static_gate_keeps_its_channels_when_another_run_goes_on(trained: Path, place: Path, tmp_path: Path):
    def static(run: Path, channels: list[int], *more: str) -> dict[str, Any]:
        path = tmp_path / "channels.json"
        path.write_text(json.dumps(channels))
        return fine_tune(place / "codec", place / "scenes", run, "gate=static", f"channels={path}", *more)

    given = (f"teacher={trained / 'teacher.pt'}", "epochs=1", "transform_epochs=0")
    results = static(tmp_path / "first", [1, 4], *given)
    init = (f"init={tmp_path / 'first'}", "epochs=0")
    assert static(tmp_path / "same", [4, 1], *init)["miou"] == results["miou"]
    with pytest.raises(TaskError, match=r"init=.*first reads other channels"):
        static(tmp_path / "other", [2, 5], *init)


def test_run__masks_that_say_nothing_are_left_out_and_other_data_is_refused(place: Path, colours: Path, tmp_path: Path):
    from data_pipeline.manifest import Manifest, Split
    from data_pipeline.shards import ShardReader, ShardWriter

    manifest = Manifest.load(place / "scenes")
    reader, root = ShardReader(place / "scenes", manifest.split("train")), tmp_path / "spoiled"
    root.mkdir()
    with ShardWriter(root, "train") as writer:
        for number in range(8):
            sample = reader.read(number)
            sample["json"] = json.loads(sample["json"])
            if number == 3:
                file = io.BytesIO()
                Image.new("L", (64, 64), 255).save(file, "PNG")
                sample["mask.png"] = file.getvalue()
            if number == 5:
                del sample["mask.png"]
            writer.write(sample)
    split = Split(tuple(writer.shards))
    Manifest("spoiled", manifest.classes, {"train": split, "val": split}, semantic_classes=manifest.mask_names).save(
        root
    )
    results = fine_tune(place / "codec", root, tmp_path / "run", "epochs=1")
    faults = {"mask that is 255, ignored, everywhere": 1, "image without a semantic mask": 1}
    assert results["left_out"] == {f"{part}: {name}": n for part in ("train", "val") for name, n in faults.items()}
    assert results["images"] == 6
    assert all(math.isfinite(row["loss"]) for row in read_rows(tmp_path / "run" / "metrics.jsonl"))

    def refused(data: Path, *words: str, more: tuple[str, ...] = ()) -> None:
        arguments = options(place / "codec", data, tmp_path / "none", *more)
        assert_refused(dicm("finetune", "semantic_segmentation_small", *arguments), *words)

    refused(colours, "semantic mask", "48 x image without a semantic mask", "dicm data build cityscapes")
    scenes = place / "scenes"
    refused(scenes, "num_channels=33", "1..32", more=("gate=variance", "num_channels=33"))
    (tmp_path / "c.json").write_text("[3, 40]")
    refused(scenes, "40", "0..31", more=("gate=static", f"channels={tmp_path / 'c.json'}"))
    refused(scenes, "c2.json", more=("gate=static", f"channels={tmp_path / 'c2.json'}"))
    refused(scenes, "backbone=resnet50", "test_resnet", "start=random", more=("backbone=resnet50",))
    refused(scenes, "teacher=", "none.pt", more=(f"teacher={tmp_path / 'none.pt'}",))
    refused(scenes, "batch_size=9", "8 training samples", more=("batch_size=9",))
    refused(scenes, "latents=vgg", more=("latents=vgg",))
    assert not (tmp_path / "none").exists()


def test_predict__draws_a_map_with_a_legend_of_images_and_of_streams(trained: Path, place: Path, tmp_path: Path):
    tuner = finetune.open_run(trained)
    image = tuner.task.dataset("val")[0].image
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "scene.png")
    assert (
        dicm("encode", tmp_path / "scene.png", "-o", tmp_path / "streams", "--codec", place / "codec").returncode == 0
    )
    for source, out in ((tmp_path / "scene.png", "a"), (tmp_path / "streams" / "scene.dicm", "b")):
        result = dicm("predict", "semantic_segmentation", trained, source, "-o", tmp_path / out)
        assert result.returncode == 0, result.stderr
    one, other = (json.loads((tmp_path / out / "scene.json").read_text()) for out in "ab")
    assert one["regions"] == other["regions"]
    assert sum(region["share"] for region in one["regions"]) == pytest.approx(1)
    total = sum(decode_mask(region["mask"], 64, 64).astype(int) for region in one["regions"])
    assert (total == 1).all()
    for out in "ab":
        drawn = np.asarray(Image.open(tmp_path / out / "scene.png"))
        assert drawn.shape[1] >= 64 and drawn.shape[0] > 64 + 13  # the legend is below, as wide as its texts
