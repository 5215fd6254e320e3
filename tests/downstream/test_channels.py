from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import assert_refused, dicm
from small_codecs import create_codec, random_images
from small_objects import SMALL_CROPS
from torchvision.io import decode_image

from downstream.channels import Counts, count_choices, most_chosen, most_varied, write_choice
from downstream.errors import TaskError
from downstream.finetune import open_run, resolve, run
from downstream.gate import DynamicGate
from downstream.latents import FeatureLatents


@pytest.fixture(scope="module")
def latents() -> FeatureLatents:
    return FeatureLatents(create_codec(), torch.device("cpu"))


def test_count_choices__counts_the_streams_that_would_carry_a_channel(latents: FeatureLatents):
    torch.manual_seed(0)
    gate, images = DynamicGate(32).train(), random_images(5, 64, 64)
    found = count_choices(gate, latents, images)
    carried = torch.zeros(32)
    for image in images:
        channels = latents.codec.describe(latents.encode(image, gate.choice)).channels
        assert channels is not None
        carried[list(channels.chosen)] += 1
    assert found.images == 5 and found.counts == carried.tolist()
    y_hat = torch.cat([latents.latents(image[None]) for image in images])
    assert found.probabilities == pytest.approx(gate.probabilities(y_hat).mean(0).tolist(), abs=1e-5)
    with pytest.raises(TaskError, match="none"):
        count_choices(gate, latents, [])


def test_most_chosen__are_the_highest_counts_and_among_equals_the_likelier():
    assert most_chosen(Counts([3, 9, 0, 9, 3], [0.5, 0.9, 0.1, 0.9, 0.6], 9), 3) == [1, 3, 4]
    assert most_chosen(Counts([1, 1, 1], [0.5] * 3, 1), 2) == [0, 1]
    for num in (0, 4):
        with pytest.raises(TaskError, match=r"1\.\.3"):
            most_chosen(Counts([1, 1, 1], [0.5] * 3, 1), num)


def test_most_varied__is_the_variance_over_all_places_of_all_images(latents: FeatureLatents):
    images = random_images(4, 64, 64)
    y_hat = torch.cat([latents.latents(image[None]) for image in images])
    variance = y_hat.transpose(0, 1).flatten(1).double().var(dim=1, correction=0)
    assert most_varied(latents, images, 5) == sorted(variance.topk(5).indices.tolist())
    with pytest.raises(TaskError, match=r"1\.\.32"):
        most_varied(latents, images, 33)


def test_write_choice__a_place_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TaskError, match="cannot be written"):
        write_choice(tmp_path / "file" / "c.json", [1], Counts([0, 1], [0.1, 0.9], 1), "codec")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of seconds on scenes, with a dynamic gate; beside its codec and data."""
    from data_pipeline.scenes import write_scenes

    folder = tmp_path_factory.mktemp("segmentation")
    write_scenes(folder / "scenes", train=8, val=4, size=64, seed=0)
    create_codec(backbone="test_resnet").save_pretrained(folder / "codec")
    run(resolve("semantic_segmentation_small", options(folder, "run")))
    return folder


def options(folder: Path, name: str, *more: str) -> list[str]:
    return [f"data={folder / 'scenes'}", f"run={folder / name}", f"codec={folder / 'codec'}", "launcher=local",
            "precision=fp32", "epochs=1", *SMALL_CROPS, *more]  # fmt: skip


def test_select_channels__writes_counts_and_a_chart_that_gate_static_reads(trained: Path):
    result = dicm("select-channels", trained / "run", "--num", "6")
    assert result.returncode == 0, result.stderr
    path = trained / "run" / "channels_6.json"
    facts = json.loads(path.read_text())
    found = Counts(facts["counts"], facts["probabilities"], facts["images"])
    assert facts["channels"] == most_chosen(found, 6)
    assert facts["images"] == 8 and len(facts["counts"]) == 32 and max(facts["counts"]) <= 8
    assert decode_image(str(path.with_suffix(".png"))).shape[1] > 200
    teacher = f"teacher={trained / 'run' / 'teacher.pt'}"
    static = options(trained, "static", teacher, "gate=static", f"channels={path}", "transform=res")
    assert run(resolve("semantic_segmentation_small", static))["channels"] == 6
    tuner = open_run(trained / "static")
    assert tuner.model.input.gate.choice == facts["channels"]
    assert_refused(dicm("select-channels", trained / "static", "--num", "6"), "gate=static", "gate=dynamic")
    # The run holds the channels, not the file's name alone: another file is another run.
    path.write_text(json.dumps({"channels": [0, 1]}))
    assert_refused(dicm("finetune", "semantic_segmentation_small", *static), "chosen", "other options")


def test_select_channels__refusals(trained: Path, finetuned: Path, tmp_path: Path):
    assert_refused(dicm("select-channels", tmp_path), str(tmp_path), "config.yaml")
    assert_refused(dicm("select-channels", trained / "run", "--num", "33"), "num=33", "1..32")
    for out, word in ((tmp_path / "c.png", "named .json"), (tmp_path, "is a folder")):
        assert_refused(dicm("select-channels", trained / "run", "-o", out), word.replace("named", "name the list"))
    assert_refused(dicm("select-channels", trained / "run", "--chart", tmp_path / "c.foo"), "c.foo", ".png")
    assert_refused(dicm("select-channels", finetuned), "gate=None", "gate=dynamic")
