"""A codec with random weights that keeps something of an image, three colours as a data set, and a run on them."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

MadeOnce = Callable[[str, Callable[[Path], object]], Path]
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
def colours(made_once: MadeOnce) -> Path:
    return made_once("colours", write_colours)


def write_random_codec(folder: Path) -> None:
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
    codec.eval().save_pretrained(folder, extra={"image_size": 64, "canvas_size": 64})


@pytest.fixture(scope="session")
def codec_folder(made_once: MadeOnce) -> Path:
    return made_once("random", write_random_codec)


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
def finetuned(codec_folder: Path, colours: Path, made_once: MadeOnce) -> Path:
    """A complete run on streams."""
    from downstream.finetune import resolve, run

    return made_once("streams", lambda folder: run(resolve("classification", _options(codec_folder, colours, folder))))


@pytest.fixture(scope="session")
def clean(codec_folder: Path, colours: Path, made_once: MadeOnce) -> Path:
    """A complete run on clean pixels."""
    from downstream.finetune import resolve, run

    def make(folder: Path) -> None:
        options = [
            f"codec={codec_folder}", f"data={colours}", f"run={folder}", "launcher=local", "precision=fp32", "epochs=2",
            "batch_size=12", "input=pixels",
        ]  # fmt: skip
        run(resolve("classification", options))

    return made_once("clean", make)


@pytest.fixture(scope="session")
def swept(clean: Path, made_once: MadeOnce) -> Path:
    """A sweep over the codec and two anchors."""
    from downstream.evaluation.points import resolve
    from downstream.evaluation.sweep import sweep

    options = [f"runs={clean}", "anchors=jpeg:5,hevc:45@0.5", "epochs=1", "options=lr=0.01"]
    return made_once("sweep", lambda out: sweep(resolve("classification", [*options, f"out={out}"])))


@pytest.fixture(scope="session")
def codec(made_once: MadeOnce) -> Path:
    """A codec whose random weights fill many symbols."""
    from small_codecs import create_codec

    return made_once("narrow", lambda folder: create_codec(backbone="test_resnet").save_pretrained(folder))
