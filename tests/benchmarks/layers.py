"""What two layers cost: streams with chosen channels in front beside streams of one layer, in bytes and to the bit.

    python tests/benchmarks/layers.py --data CAMVID --codec CODEC [--split val] [--every 4] [--json FILE]

For y2 of the codec and for y of a bmshj2018-hyperprior (random weights, scaled to the images, unless --weights names
trained ones): bytes of the base with 16 and with 64 channels, of base and rest, and of one layer; aim: the sum at most
2 % over one layer. Base and rest are decoded to the latent, and for CompressAI to the image, of the single stream: equal
to the bit, or the script stops.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import smoke
import torch
from compressai.zoo import image_models
from rich.console import Console
from rich.table import Table

from data_pipeline.manifest import Manifest
from data_pipeline.samples import picture_of, to_tensor
from data_pipeline.shards import ShardReader
from downstream.compressai_latents import CompressAILatents, create_latents
from downstream.compressai_models import load_model
from downstream.latents import FeatureLatents, LatentCodec
from pretrain.codec.feature_codec import FeatureCodec

HYPERPRIOR = "bmshj2018-hyperprior"
CPU = torch.device("cpu")


def random_hyperprior(images: Sequence[torch.Tensor]) -> CompressAILatents:
    """The hyperprior with random weights whose latents of `images` have a deviation of three symbols."""
    torch.manual_seed(0)
    model = image_models[HYPERPRIOR](quality=4).eval().requires_grad_(False)
    pixels = images[0][None, :, :256, :256].float() / 255
    model.g_a[-1].weight.mul_(3 / model.g_a(pixels).std())
    model.h_a[-1].weight.mul_(3 / model.h_a(model.g_a(pixels).abs()).std())
    return create_latents(model, CPU)


def layer_sizes(latents: LatentCodec, images: Sequence[torch.Tensor], count: int) -> dict[str, float]:
    """Mean bytes of the base with `count` channels, of both layers and of one; and the last two's ratio."""
    chosen = list(range(0, latents.channels, latents.channels // count))[:count]
    base = both = single = 0
    for image in images:
        one, layered = latents.encode(image), latents.encode(image, chosen, rest=True)
        assert torch.equal(latents.decode(layered), latents.decode(one))
        if isinstance(latents, CompressAILatents):
            assert torch.equal(latents.decode_image(layered), latents.decode_image(one))
        first, second = latents.split(layered)
        assert torch.equal(latents.receive(first).latents[0], latents.decode(one)[0, chosen])
        base, both, single = base + len(first), both + len(first) + len(second), single + len(one)
    number = len(images)
    return {"base": base / number, "both": both / number, "single": single / number, "over": both / single - 1}


def small(folder: Path) -> list[str]:
    """Options of a tiny run."""
    return ["--data", str(smoke.scenes(folder)), "--codec", str(smoke.codec(folder)), "--every", "4"]


def create_parser() -> argparse.ArgumentParser:
    """Its options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--codec", required=True)
    parser.add_argument("--split", default="val")
    parser.add_argument("--every", type=int, default=4, help="of the images one in so many is taken")
    parser.add_argument("--weights", help="of the hyperprior: a file, or zoo")
    parser.add_argument("--json", type=Path)
    smoke.add_option(parser)
    return parser


def main() -> None:
    arguments = smoke.parse(create_parser(), small)
    reader = ShardReader(arguments.data, Manifest.load(arguments.data).split(arguments.split))
    images = [to_tensor(picture_of(reader.read(index))) for index in range(0, len(reader), arguments.every)]
    if arguments.weights:
        hyperprior = create_latents(load_model(HYPERPRIOR, weights=arguments.weights), CPU)
    else:
        hyperprior = random_hyperprior(images)
    codec = FeatureCodec.from_pretrained(arguments.codec)
    sources = {"y2 of the codec": FeatureLatents(codec, CPU), HYPERPRIOR: hyperprior}
    figures = {
        name: {count: layer_sizes(latents, images, count) for count in (16, 64) if count < latents.channels}
        for name, latents in sources.items()
    }
    table = Table("latents", "channels in base", "base, bytes", "base + rest", "one layer", "over")
    for name, sizes in figures.items():
        for count, row in sizes.items():
            cells = [f"{row[key]:.0f}" for key in ("base", "both", "single")]
            table.add_row(name, str(count), *cells, f"{100 * row['over']:+.2f} %")
    Console(width=120).print(table, f"{len(images)} images; every latent and image the same to the bit")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
