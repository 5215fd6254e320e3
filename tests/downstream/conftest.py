"""A codec with random weights that keeps something of an image, three colours as a data set, and a run on them."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

CLASSES = ("red", "green", "blue")


def write_colours(root: Path, *, train: int = 48, val: int = 18) -> Path:
    """Noisy images of 64 px in three colours, the colour being the class."""
    from data_pipeline.manifest import Manifest, Split
    from data_pipeline.shards import ShardWriter

    root.mkdir(parents=True)
    random = np.random.default_rng(0)
    written = {}
    for split, count in (("train", train), ("val", val)):
        with ShardWriter(root, split) as writer:
            for number in range(count):
                pixels = random.integers(0, 90, (64, 64, 3), dtype=np.uint8)
                pixels[..., number % 3] += 150
                file = io.BytesIO()
                Image.fromarray(pixels).save(file, "PNG")
                label = {"label": number % 3}
                writer.write({"__key__": f"{split}-{number:04d}", "png": file.getvalue(), "json": label})
        written[split] = Split(tuple(writer.shards))
    Manifest("colours", CLASSES, written).save(root)
    return root


@pytest.fixture(scope="session")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_colours(tmp_path_factory.mktemp("data") / "colours")


@pytest.fixture(scope="session")
def codec_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from pretrain.codec.config import CodecConfig
    from pretrain.codec.feature_codec import FeatureCodec

    torch.manual_seed(0)
    codec = FeatureCodec(
        CodecConfig(
            backbone="test_resnet",
            re_channels=16,
            re_latent=16,
            re_depths=[1, 1, 1],
            transform_channels=16,
            latent_channels=16,
            hyper_dim=24,
            hyper_heads=2,
            hyper_head_dim=12,
            z_channels=8,
        )
    )
    with torch.no_grad():  # latents of some size, as trained ones have: the streams differ from image to image
        codec.g_a[-1].weight.mul_(30)
    folder = tmp_path_factory.mktemp("codecs") / "random"
    codec.eval().save_pretrained(folder, extra={"image_size": 64, "canvas_size": 64})
    return folder


def _options(codec: Path, data: Path, run: Path, *overrides: str) -> list[str]:
    return [
        f"codec={codec}", f"data={data}", f"run={run}", "launcher=local", "workers=1", "precision=fp32", "epochs=3",
        "batch_size=12", "log_every=1", *overrides,
    ]  # fmt: skip


@pytest.fixture
def options() -> Callable[..., list[str]]:
    """Options of a fine-tune of seconds, by codec, data and run folder, and further ones."""
    return _options


@pytest.fixture(scope="session")
def finetuned(codec_folder: Path, colours: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run on streams."""
    from downstream.finetune import resolve, run

    folder = tmp_path_factory.mktemp("runs") / "streams"
    run(resolve("classification", _options(codec_folder, colours, folder)))
    return folder


@pytest.fixture(scope="session")
def clean(codec_folder: Path, colours: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run on clean pixels."""
    from downstream import finetune

    folder = tmp_path_factory.mktemp("runs") / "clean"
    options = [
        f"codec={codec_folder}", f"data={colours}", f"run={folder}", "launcher=local", "precision=fp32", "epochs=2",
        "batch_size=12", "input=pixels",
    ]  # fmt: skip
    finetune.run(finetune.resolve("classification", options))
    return folder


@pytest.fixture(scope="session")
def swept(clean: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep over the codec and two anchors, in two processes."""
    from downstream.evaluation.points import resolve
    from downstream.evaluation.sweep import sweep

    out = tmp_path_factory.mktemp("sweeps") / "sweep"
    sweep(resolve("classification", [f"runs={clean}", f"out={out}", "anchors=jpeg:5,hevc:45@0.5", "epochs=1",
                                     "options=lr=0.01", "parallel=2"]))  # fmt: skip
    return out


@pytest.fixture(scope="session")
def codec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A codec whose random weights fill many symbols."""
    from small_codecs import create_codec

    folder = tmp_path_factory.mktemp("codecs") / "narrow"
    create_codec().save_pretrained(folder)
    return folder
