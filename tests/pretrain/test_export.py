from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from conftest import SHORT, assert_refused, dicm, small_run
from torchvision.io import decode_image, write_png

from pretrain.codec.feature_codec import FeatureCodec
from pretrain.export import export, load_run
from pretrain.run import run


def test_export__holds_three_files_and_no_pickle(exported_codec: Path):
    assert {path.name for path in exported_codec.iterdir()} == {"model.safetensors", "config.json", "README.md"}
    facts = json.loads((exported_codec / "config.json").read_text())
    card = (exported_codec / "README.md").read_text()
    assert facts["extra"]["dataset"] in card
    assert f"{facts['extra']['streams']['bpp']:.4f} bpp" in card


def test_export__loads_frozen_and_equal_to_the_run(exported_codec: Path, pretrained_run: Path):
    codec = FeatureCodec.from_pretrained(exported_codec)
    assert not codec.training
    assert not any(parameter.requires_grad for parameter in codec.parameters())
    image = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    trained, _, _ = load_run(pretrained_run)
    stream = codec.encode(image)
    assert stream == trained.encode(image)
    assert torch.equal(codec.decode(stream), trained.decode(stream))


def test_export__not_a_run(tmp_path: Path):
    assert_refused(dicm("export", tmp_path, tmp_path / "codec"), str(tmp_path), "dicm pretrain")


def test_export__of_a_run_with_a_torn_row_of_metrics(pretrained_run: Path, exported_codec: Path, tmp_path: Path):
    folder = shutil.copytree(pretrained_run, tmp_path / "run")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "kn')
    export(folder, tmp_path / "codec")
    facts, before = (json.loads((path / "config.json").read_text()) for path in (tmp_path / "codec", exported_codec))
    assert facts["extra"]["knn"] == before["extra"]["knn"]


def test_export__leaves_foreign_folders_alone(pretrained_run: Path, tmp_path: Path):
    (tmp_path / "thesis.txt").write_text("years of work")
    assert_refused(dicm("export", pretrained_run, tmp_path), "thesis.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_export__again_replaces_the_earlier_export(pretrained_run: Path, exported_codec: Path, tmp_path: Path):
    folder = shutil.copytree(exported_codec, tmp_path / "codec")
    before = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(before[:1000])
    export(pretrained_run, folder)
    assert (folder / "model.safetensors").read_bytes() == before


def test_encode_decode__files(exported_codec: Path, tmp_path: Path):
    for name, size in {"a": (40, 50), "b": (17, 64)}.items():
        write_png(torch.randint(0, 256, (3, *size), dtype=torch.uint8), str(tmp_path / f"{name}.png"))
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    encoded = dicm("encode", tmp_path, "-o", tmp_path / "streams", "--codec", exported_codec)
    assert encoded.returncode == 0, encoded.stderr
    assert "2 images" in encoded.stdout and "broken.png" in encoded.stdout
    decoded = dicm("decode", tmp_path / "streams", "-o", tmp_path / "features", "--codec", exported_codec)
    assert decoded.returncode == 0, decoded.stderr
    assert np.load(tmp_path / "features" / "b.npy").shape == (32, 5, 16)


def test_decode__damaged_stream_is_named(exported_codec: Path, tmp_path: Path):
    stream = FeatureCodec.from_pretrained(exported_codec).encode(torch.zeros(3, 32, 32, dtype=torch.uint8))
    (tmp_path / "cut.dicm").write_bytes(stream[:-1])
    assert_refused(dicm("decode", tmp_path, "-o", tmp_path / "out", "--codec", exported_codec), "cut.dicm")


def test_encode__codec_folder_with_a_file_missing_or_damaged(exported_codec: Path, tmp_path: Path):
    write_png(torch.zeros(3, 32, 32, dtype=torch.uint8), str(tmp_path / "a.png"))
    for name, damage in {
        "model.safetensors": lambda path: path.unlink(),
        "config.json": lambda path: path.write_text("{"),
    }.items():
        folder = shutil.copytree(exported_codec, tmp_path / name.replace(".", "_"))
        damage(folder / name)
        assert_refused(dicm("encode", tmp_path / "a.png", "-o", tmp_path / "out", "--codec", folder), name)


def test_pretrain__starts_from_a_codec_and_adds_a_range_of_rates(exported_codec: Path, scenes: Path, tmp_path: Path):
    """All weights that both have are taken; gains and their rates are new."""
    options = ["only=[codec]", "codec.rate_points=3", "stages.codec.rates=[3,1,0.3]", f"init={exported_codec}"]
    folder = run(small_run(scenes, tmp_path / "range", *options))
    codec = FeatureCodec.from_pretrained(export(folder, tmp_path / "codec"))
    start = FeatureCodec.from_pretrained(exported_codec)
    assert torch.equal(codec.redundancy.encoder[0].weight, start.redundancy.encoder[0].weight)
    assert not torch.equal(codec.g_a[-1].weight, start.g_a[-1].weight)
    assert codec.y2_gain is not None
    untrained = torch.linspace(-0.5, 0.5, 3)[:, None].expand_as(codec.y2_gain.log_gain)
    assert not torch.equal(codec.y2_gain.log_gain, untrained)
    card = (tmp_path / "codec" / "README.md").read_text()
    for rate in ("0", "0.5", "1"):
        assert f"at rate={rate} |" in card

    write_png(torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8), str(tmp_path / "a.png"))
    limit = len(codec.encode(decode_image(str(tmp_path / "a.png")), rate=0.5))
    for option, value in (("--rate", "0.25"), ("--max-bytes", str(limit))):
        out = tmp_path / option
        result = dicm("encode", tmp_path / "a.png", "-o", out, "--codec", tmp_path / "codec", option, value)
        assert result.returncode == 0, result.stderr
        stream = (out / "a.dicm").read_bytes()
        assert codec.describe(stream).rate == 64 if option == "--rate" else len(stream) <= limit


def test_pretrain__a_codec_of_other_widths_is_no_start(exported_codec: Path, scenes: Path, tmp_path: Path):
    options = ["launcher=local", "workers=1", *SHORT, f"init={exported_codec}"]
    result = dicm("pretrain", "small", f"data={scenes}", f"run={tmp_path}", *options)
    assert_refused(result, "init=", "codec.", "set codec.")
