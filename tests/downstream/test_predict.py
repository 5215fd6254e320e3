"""`dicm predict`: pictures and JSON from images and from streams."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import assert_refused, dicm
from PIL import Image
from safetensors.torch import save_file
from small_objects import NARROW_DETECTOR, SIZES, rectangle, rectangles, write_objects

from downstream import finetune
from downstream.compressai_models import new_model
from pretrain.codec.feature_codec import FeatureCodec


@pytest.fixture(scope="module")
def detected(codec_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run of a detector, whose data set is gone."""
    folder = tmp_path_factory.mktemp("runs")
    data = write_objects(folder / "data", {"train": rectangles(8), "val": rectangles(2)})
    finetune.run(
        finetune.resolve(
            "detection_small",
            [f"codec={codec_folder}", f"data={data}", f"run={folder / 'run'}", "launcher=local", "precision=fp32",
             "epochs=1", "batch_size=4", *NARROW_DETECTOR],
        )
    )  # fmt: skip
    shutil.rmtree(data)
    return folder / "run"


def labelled(count: int) -> list[tuple[np.ndarray, dict[str, Any]]]:
    """Such images, with a class each."""
    return [(pixels, {"label": number % 3}) for number, (pixels, _) in enumerate(rectangles(count))]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, size in enumerate(SIZES):
        Image.fromarray(rectangle(number, *size)[0]).save(folder / f"photo{number}.png")
    return folder


def test_predict__images_and_their_streams_say_the_same(
    detected: Path, codec_folder: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("WORLD_SIZE", "2")  # of a launcher, which is none of its business
    assert dicm("encode", photos, "-o", tmp_path / "streams", "--codec", codec_folder).returncode == 0
    for source, out in ((photos, "a"), (tmp_path / "streams", "b")):
        result = dicm("predict", "detection", detected, source, "-o", tmp_path / out, "--score", "0")
        assert result.returncode == 0, result.stderr
        assert "3 files" in result.stdout and "bpp" in result.stdout
    for number, (width, height) in enumerate(SIZES):
        one, other = (json.loads((tmp_path / out / f"photo{number}.json").read_text()) for out in "ab")
        assert (one["height"], one["width"]) == (other["height"], other["width"]) == (height, width)
        assert one["bytes"] == other["bytes"] == (tmp_path / "streams" / f"photo{number}.dicm").stat().st_size
        assert one["objects"] == other["objects"] and one["objects"]
        assert {"class", "label", "score", "box"} == set(one["objects"][0])
        photo = np.asarray(Image.open(photos / f"photo{number}.png"))
        for out in "ab":
            drawn = np.asarray(Image.open(tmp_path / out / f"photo{number}.png"))
            assert drawn.shape == (height, width, 3)
        assert not np.array_equal(np.asarray(Image.open(tmp_path / "a" / f"photo{number}.png")), photo)


def test_predict__classes_of_images(finetuned: Path, photos: Path, tmp_path: Path):
    pixels = np.random.default_rng(0).integers(0, 90, (64, 64, 3), dtype=np.uint8)
    pixels[..., 1] += 150
    Image.fromarray(pixels).save(tmp_path / "green.png")
    result = dicm("predict", "classification", finetuned, tmp_path / "green.png", "-o", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "out" / "green.json").read_text())
    assert found["classes"][0]["class"] == "green" and len(found["classes"]) == 3
    assert sum(item["score"] for item in found["classes"]) == pytest.approx(1)


def test_predict__is_refused_in_one_line(detected: Path, codec_folder: Path, photos: Path, tmp_path: Path):
    def refused(*arguments: str | Path, words: tuple[str, ...]) -> None:
        assert_refused(dicm("predict", *arguments), *words)

    out = ("-o", tmp_path / "out")
    photo = photos / "photo0.png"
    refused("classification", detected, photo, *out, words=("run of detection", "dicm predict detection"))
    refused("detektion", detected, photo, *out, words=("task=detektion", "detection"))
    refused("detection", photos, photo, *out, words=("not a run folder",))
    refused("detection", detected, tmp_path / "none.png", *out, words=("none.png", "no such file"))
    refused("detection", detected, detected / "checkpoints", *out, words=("no file that ends in",))
    refused("detection", detected, photo, *out, "--score", "2", words=("--score=2", "0..1"))
    (tmp_path / "broken.png").write_bytes(b"no image")
    refused("detection", detected, tmp_path / "broken.png", *out, words=("broken.png", "decoded"))
    (tmp_path / "photo0.dicm").write_bytes(b"no stream")
    refused("detection", detected, tmp_path / "photo0.dicm", *out, words=("photo0.dicm",))
    refused("detection", detected, photo, tmp_path / "photo0.dicm", *out, words=("both be written",))
    assert not (tmp_path / "out").exists()


def test_predict__of_several_files_the_broken_one_is_left_out_by_name(detected: Path, photos: Path, tmp_path: Path):
    (photos / "broken.png").write_bytes(b"no image")
    (photos / "scan.bmp").write_bytes(b"not looked at")
    result = dicm("predict", "detection", detected, photos, "-o", tmp_path / "out")
    assert result.returncode == 0 and "3 files" in result.stdout and "2 left out" in result.stdout
    for name in ("broken.png", "scan.bmp"):
        assert f"left out: {photos / name}: " in result.stdout


def test_predict__a_run_on_pixels_takes_images_and_no_streams(
    codec_folder: Path, colours: Path, photos: Path, tmp_path: Path, options
):
    overrides = options(codec_folder, colours, tmp_path / "run", "input=pixels", "anchor=jpeg:30", "epochs=1")
    finetune.run(finetune.resolve("classification", overrides))
    result = dicm("predict", "classification", tmp_path / "run", photos / "photo0.png", "-o", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    (tmp_path / "x.dicm").write_bytes(torch.zeros(40, dtype=torch.uint8).numpy().tobytes())
    assert_refused(
        dicm("predict", "classification", tmp_path / "run", tmp_path / "x.dicm", "-o", tmp_path / "out"), "input=pixels"
    )


def test_predict__overwrites_no_source(detected: Path, photos: Path):
    before = {path: path.read_bytes() for path in photos.iterdir()}
    assert_refused(dicm("predict", "detection", detected, photos, "-o", photos), "photo0.png", "overwritten", "-o")
    assert {path: path.read_bytes() for path in photos.iterdir()} == before


def test_predict__a_run_that_is_not_complete_or_of_another_codec(
    detected: Path, codec_folder: Path, photos: Path, tmp_path: Path
):
    cut = shutil.copytree(detected, tmp_path / "cut")
    (cut / "results.json").unlink()
    out = ("-o", tmp_path / "out")
    assert_refused(dicm("predict", "detection", cut, photos, *out), "not complete", "dicm finetune detection")
    torch.manual_seed(1)
    FeatureCodec(FeatureCodec.from_pretrained(codec_folder).config).eval().save_pretrained(tmp_path / "other")
    other = ("--codec", tmp_path / "other")
    assert_refused(dicm("predict", "detection", detected, photos, *out, *other), "codec is another one now")
    moved = shutil.copytree(codec_folder, tmp_path / "moved")
    assert dicm("predict", "detection", detected, photos, *out, "--codec", moved).returncode == 0


def test_predict__another_anchor_in_the_place_of_the_runs_is_refused(
    codec_folder: Path, photos: Path, tmp_path: Path, options
):
    data = write_objects(tmp_path / "data", {"train": labelled(12), "val": labelled(3)})
    weights = tmp_path / "weights.safetensors"

    def write(seed: int) -> None:
        torch.manual_seed(seed)
        state = new_model("bmshj2018-factorized", 1).state_dict()
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, weights)

    write(0)
    anchor = ("input=pixels", "anchor=bmshj2018-factorized:1", f"anchor_weights={weights}", "epochs=1")
    finetune.run(finetune.resolve("classification", options(codec_folder, data, tmp_path / "run", *anchor)))
    arguments = ("predict", "classification", tmp_path / "run", photos / "photo0.png", "-o", tmp_path / "out")
    assert dicm(*arguments).returncode == 0
    write(1)
    assert_refused(dicm(*arguments), "anchor_weights is another one now")


def test_predict__nothing_but_unusable_files_is_an_error(detected: Path, tmp_path: Path):
    for name in ("a.png", "b.jpg"):
        (tmp_path / name).write_bytes(b"")
    result = dicm("predict", "detection", detected, tmp_path / "a.png", tmp_path / "b.jpg", "-o", tmp_path / "out")
    assert_refused(result, "none of 2 files", "a.png: ", "b.jpg: ")
