"""What a codec loses of the features that its backbone sees, by rate, beside what pixel codecs lose of them.

    python tests/benchmarks/distortion.py DATA CODEC [CODEC ...] [--anchors hevc:51 hevc:47 ...] [--split val]
        [--limit 100] [--json FILE]

Prints, for each rate, bits per pixel of the payload and the squared error of f3 and of layer2 to layer4 behind it, in
shares of the variance, over the places of each map, of what the backbone makes of the image. Anchors
(`NAME:QUALITY[@SCALE]`) are seen through each codec's backbone. Needs neither labels nor a trained network, and is less
noisy than an accuracy.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from data_pipeline.manifest import Manifest
from data_pipeline.samples import picture_of, to_tensor
from data_pipeline.shards import ShardReader
from data_pipeline.views import normalize
from downstream.evaluation.anchors import Anchor, create_anchor
from downstream.evaluation.points import DEFAULT_RATES
from pretrain.codec.backbone import HEAD_STRIDE, crop_to, pad_to
from pretrain.codec.coder import Z_STRIDE
from pretrain.codec.feature_codec import FeatureCodec

LAYERS = ("f3", "layer2", "layer3", "layer4")

# Bits and f3 (1, C, H/4, W/4) of an image (3, H, W) uint8.
Coder = Callable[[Tensor], tuple[float, Tensor]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("codecs", nargs="+", type=Path)
    parser.add_argument("--anchors", nargs="*", default=[])
    parser.add_argument("--split", default="val")
    parser.add_argument("--limit", type=int, default=100, help="images, evenly spread; %(default)s")
    parser.add_argument("--json", type=Path, help="file for the figures")
    arguments = parser.parse_args()

    reader = ShardReader(arguments.data, Manifest.load(arguments.data).split(arguments.split))
    every = -(-len(reader) // arguments.limit)
    images = [to_tensor(picture_of(reader.read(index))) for index in range(0, len(reader), every)]
    rows = []
    table = Table("backbone of", "coded by", "bpp, payload", *LAYERS)
    for folder in arguments.codecs:
        codec = FeatureCodec.from_pretrained(folder)
        for name, coder in coders(codec, arguments.anchors):
            row = {"backbone": str(folder), "coded_by": name, **measure(codec, coder, images)}
            rows.append(row)
            table.add_row(str(folder), name, f"{row['bpp']:.4f}", *(f"{row[layer]:.3f}" for layer in LAYERS))
    Console(width=120).print(table, f"{len(images)} images; squared errors in shares of the variance")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


def coders(codec: FeatureCodec, anchors: Sequence[str]) -> list[tuple[str, Coder]]:
    """The codec at its rates, and the anchors through its backbone."""
    rates = [None] if codec.y2_gain is None else DEFAULT_RATES
    found: list[tuple[str, Coder]] = [
        ("itself" if rate is None else f"itself, rate {rate:g}", partial(at_rate, codec, rate)) for rate in rates
    ]
    return found + [(name, partial(through_anchor, codec, create_anchor(name))) for name in anchors]


def at_rate(codec: FeatureCodec, rate: float | None, image: Tensor) -> tuple[float, Tensor]:
    output = codec(pixels(image), rate)
    return float(output.bits.sum()), output.f3


def through_anchor(codec: FeatureCodec, anchor: Anchor, image: Tensor) -> tuple[float, Tensor]:
    height, width = image.shape[-2:]
    stream = anchor.encode(image.permute(1, 2, 0).contiguous().numpy())
    decoded = torch.tensor(anchor.decode(stream)).permute(2, 0, 1)
    return 8.0 * anchor.payload_bytes(stream, height, width), head(codec, decoded)


def pixels(image: Tensor) -> Tensor:
    """(1, 3, H, W) normalised."""
    return normalize(image[None].float() / 255)


def head(codec: FeatureCodec, image: Tensor) -> Tensor:
    """f1 (1, C, H/4, W/4) as the codec sees it."""
    features = codec.backbone.head(pad_to(pixels(image), Z_STRIDE))
    return crop_to(features, image.shape[1], image.shape[2], HEAD_STRIDE)


@torch.inference_mode()
def measure(codec: FeatureCodec, coder: Coder, images: Sequence[Tensor]) -> dict[str, Any]:
    """Bits per pixel, and squared error by layer in shares of the variance."""
    bits = area = 0.0
    errors, variances = torch.zeros(len(LAYERS)), torch.zeros(len(LAYERS))
    for image in images:
        f1 = head(codec, image)
        coded, f3 = coder(image)
        bits += coded
        area += image[0].numel()
        pairs = zip((f3, *codec.backbone.tail(f3)), (f1, *codec.backbone.tail(f1)), strict=True)
        for layer, (found, wanted) in enumerate(pairs):
            errors[layer] += (found - wanted).square().sum()
            variances[layer] += (wanted - wanted.mean((2, 3), keepdim=True)).square().sum()
    return {
        "bpp": bits / area,
        **dict(zip(LAYERS, (errors / variances).tolist(), strict=True)),
    }


if __name__ == "__main__":
    main()
