"""What a codec loses of the features that its backbone sees, by rate, beside what pixel codecs lose of them.

    python tests/benchmarks/distortion.py DATA CODEC [CODEC ...] [--anchors hevc:51 hevc:47 ...] [--split val]
        [--limit 100] [--json FILE]

Prints, for each rate, bits per pixel of the payloads of real streams and the squared error of f3 and of layer2 to layer4
behind it, in shares of the variance, over the places of each map, of what the backbone makes of the image; and those
of the transforms alone, without rounding. Anchors
(`NAME:QUALITY[@SCALE]`) are seen through each codec's backbone. Needs neither labels nor a trained network.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import smoke
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from cluster.runtime import LocalRuntime
from data_pipeline.manifest import Manifest
from data_pipeline.samples import picture_of, to_tensor
from data_pipeline.shards import ShardReader
from data_pipeline.views import normalize
from downstream.evaluation.points import DEFAULT_RATES
from downstream.frozen import FeatureSource, RateMeter, source_of
from pretrain.codec.backbone import HEAD_STRIDE, crop_to
from pretrain.codec.feature_codec import FeatureCodec

LAYERS = ("f3", "layer2", "layer3", "layer4")

CPU = torch.device("cpu")


def small(folder: Path) -> list[str]:
    """Options of a tiny run."""
    return [str(smoke.scenes(folder)), str(smoke.codec(folder)), "--anchors", "jpeg:10", "--limit", "2"]


def create_parser() -> argparse.ArgumentParser:
    """Its options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("codecs", nargs="+", type=Path)
    parser.add_argument("--anchors", nargs="*", default=[])
    parser.add_argument("--split", default="val")
    parser.add_argument("--limit", type=int, default=100, help="most images, evenly spread; %(default)s")
    parser.add_argument("--json", type=Path, help="file for the figures")
    smoke.add_option(parser)
    return parser


def main() -> None:
    arguments = smoke.parse(create_parser(), small)

    reader = ShardReader(arguments.data, Manifest.load(arguments.data).split(arguments.split))
    every = -(-len(reader) // arguments.limit)
    images = [to_tensor(picture_of(reader.read(index))) for index in range(0, len(reader), every)]
    rows = []
    table = Table("backbone of", "coded by", "bpp, payload", *LAYERS)
    for folder in arguments.codecs:
        codec = FeatureCodec.from_pretrained(folder)
        clean = source_of(codec, "pixels", None, None, CPU)
        wanted = [layers_of(codec, clean.features(image[None])) for image in images]
        transformed = errors_of(codec, [unrounded(codec, image) for image in images], wanted)
        rows.append({"backbone": str(folder), "coded_by": "its transforms", "bpp": None, **transformed})
        table.add_row(str(folder), "its transforms", "", *(f"{transformed[layer]:.3f}" for layer in LAYERS))
        for name, source in sources(codec, arguments.anchors):
            row = {"backbone": str(folder), "coded_by": name, **measure(codec, source, images, wanted)}
            rows.append(row)
            table.add_row(str(folder), name, f"{row['bpp']:.4f}", *(f"{row[layer]:.3f}" for layer in LAYERS))
    Console(width=120).print(table, f"{len(images)} images; squared errors in shares of the variance")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


def sources(codec: FeatureCodec, anchors: Sequence[str]) -> list[tuple[str, FeatureSource]]:
    """The codec at its rates, and the anchors through its backbone."""
    rates = [None] if codec.y2_gain is None else DEFAULT_RATES
    itself = [
        ("itself" if rate is None else f"itself, rate {rate:g}", source_of(codec, "streams", None, rate, CPU))
        for rate in rates
    ]
    return itself + [(name, source_of(codec, "pixels", name, None, CPU)) for name in anchors]


@torch.inference_mode()
def layers_of(codec: FeatureCodec, features: Tensor) -> tuple[Tensor, ...]:
    """Features (1, C, H/4, W/4), and layer2 to layer4 behind them."""
    return features, *codec.backbone.tail(features)


def measure(
    codec: FeatureCodec, source: FeatureSource, images: Sequence[Tensor], wanted: Sequence[tuple[Tensor, ...]]
) -> dict[str, Any]:
    """Bits per pixel of real streams, and their errors."""
    meter, found = RateMeter(), []
    for image in images:
        features, sizes, payloads = source.through_streams(image[None])
        meter.add(sizes, payloads, *image.shape[1:])
        found.append(features)
    return {"bpp": meter.rates(LocalRuntime())["bpp_payload"], **errors_of(codec, found, wanted)}


@torch.inference_mode()
def unrounded(codec: FeatureCodec, image: Tensor) -> Tensor:
    """Features (1, C, H/4, W/4) of an image that went through the transforms, and nothing else."""
    y2, _ = codec.analyse(normalize(image[None].float() / 255))
    return crop_to(codec.g_s(y2), *image.shape[1:], HEAD_STRIDE)


@torch.inference_mode()
def errors_of(codec: FeatureCodec, found: Sequence[Tensor], wanted: Sequence[tuple[Tensor, ...]]) -> dict[str, float]:
    """Squared errors of features from `wanted`, by layer, in shares of its variance."""
    errors, variances = torch.zeros(len(LAYERS)), torch.zeros(len(LAYERS))
    for features, layers in zip(found, wanted, strict=True):
        for place, (ours, clean) in enumerate(zip(layers_of(codec, features), layers, strict=True)):
            errors[place] += (ours - clean).square().sum()
            variances[place] += (clean - clean.mean((2, 3), keepdim=True)).square().sum()
    return dict(zip(LAYERS, (errors / variances).tolist(), strict=True))


if __name__ == "__main__":
    main()
