"""What a range of rates and a narrow shape cost, each against the codec that was trained for one thing alone.

Trains, from the backbone of one exported codec and on the same data in the same number of steps: two codecs of one
rate, one with a range whose ends weigh bits as they do, a codec of the recipe's shape and one cut as recipe `fast` cuts
the authors'. Prints for each, on the validation split: real bits per pixel (payload; streams of single images), the
objective's distortion (relative MSE at f3 and layer2..layer4, against f2), what it minimised, and the kNN accuracy
of its decoded features.

    python tests/benchmarks/variants.py --data data/tiny --init codec --out runs/variants [--recipe tiny_imagenet20]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import smoke
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from data_pipeline.loader import eval_loader
from data_pipeline.views import center_images, normalize
from pretrain.codec.feature_codec import FeatureCodec
from pretrain.config import PretrainConfig
from pretrain.export import export
from pretrain.run import resolve, run
from pretrain.ssl.evaluation import knn_accuracy

FEW, MANY = 1.0, 0.1  # weights of the rate at the two ends
BATCH = 50
# As recipe `fast` cuts the authors' codec: no block at H/4, and about two thirds and a half of the widths.
CUT = [
    "codec.re_channels=24", "codec.re_latent=48", "codec.re_depths=[0,1,1]", "codec.re_kernel=7",
    "codec.transform_channels=48", "codec.latent_channels=64", "codec.rgc_orders=[0,2,3]", "codec.hyper_dim=48",
    "codec.hyper_heads=2", "codec.hyper_head_dim=24", "codec.z_channels=32",
]  # fmt: skip
BACKBONE = ["init_parts=[backbone]", "codec.redundancy=true", "only=[redundancy,codec]"]
VARIANTS = {
    "one rate, few bits": ["only=[codec]", f"stages.codec.rate={FEW}"],
    "one rate, many bits": ["only=[codec]", f"stages.codec.rate={MANY}"],
    "a range": ["only=[codec]", "codec.rate_points=3", f"stages.codec.rates=[{FEW},{(FEW * MANY) ** 0.5:.3f},{MANY}]"],
    "the recipe's shape": [*BACKBONE, f"stages.codec.rate={MANY}"],
    "cut as `fast`": [*BACKBONE, f"stages.codec.rate={MANY}", *CUT],
}


def small(folder: Path) -> list[str]:
    """Options of a tiny run."""
    runs = ["--data", str(smoke.scenes(folder)), "--init", str(smoke.codec(folder)), "--out", str(folder / "runs")]
    short = ["stages.redundancy.epochs=1", "stages.redundancy.batch_size=16", "stages.codec.epochs=1"]
    shape = [
        *smoke.NARROW,
        "codec.redundancy=true",
        "codec.latent_channels=32",
        "codec.base_channels=16",
    ]  # that codec's
    return [*runs, *shape, *short, "workers=1"]


def create_parser() -> argparse.ArgumentParser:
    """Its options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="data set with labels, a train and a val split")
    parser.add_argument("--init", type=Path, required=True, help="exported codec")
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs; those in it are gone on with")
    parser.add_argument("--recipe", default="tiny_imagenet20")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("overrides", nargs="*", help="further options of each run, key=value")
    smoke.add_option(parser)
    return parser


def main() -> None:
    arguments = smoke.parse(create_parser(), small)

    figures = {}
    for name, options in VARIANTS.items():
        folder = arguments.out / name.replace(" ", "_").replace(",", "").replace("`", "").replace("'", "")
        fixed = [f"data={arguments.data}", f"init={arguments.init}", f"run={folder}", "launcher=local"]
        config = resolve(arguments.recipe, [*fixed, *options, *arguments.overrides])
        run(config)
        codec = FeatureCodec.from_pretrained(export(folder, folder / "codec"))
        if name == "a range":
            figures["a range, at 0"] = measure(config, codec, FEW, 0.0)
            figures["a range, at 1"] = measure(config, codec, MANY, 1.0)
        else:
            figures[name] = measure(config, codec, FEW if "few" in name else MANY)

    table = Table("codec", "bpp", "distortion", "weight * bpp + distortion", "kNN")
    for name, row in figures.items():
        table.add_row(
            name,
            f"{row['bpp']:.4f}",
            f"{row['distortion']:.4f}",
            f"{row['objective']:.4f}",
            f"{100 * row['knn']:.1f} %",
        )
    Console(width=110).print(table)
    for end, single, ranged in (
        ("few", "one rate, few bits", "a range, at 0"),
        ("many", "one rate, many bits", "a range, at 1"),
    ):
        loss = figures[ranged]["objective"] / figures[single]["objective"] - 1
        print(f"{end} bits: what the range minimised is {100 * loss:+.1f} % of the codec of one rate")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


@torch.inference_mode()
def measure(config: PretrainConfig, codec: FeatureCodec, weight: float, rate: float | None = None) -> dict[str, float]:
    """Figures of a codec on val; `weight` of the rate in what it minimised."""
    stage = config.stages[-1]
    banks: list[Tensor] = []
    bits = pixels = distortion = batches = 0.0
    for split in ("train", "val"):
        features, labels = [], []
        for batch in eval_loader(
            config.data,
            split,
            canvas_size=config.canvas_size,
            batch_size=BATCH,
            limit=2000 if split == "train" else None,
        ):
            pictures = center_images(batch.canvas, batch.aspect, config.image_size)
            output = codec(normalize(pictures.float() / 255), rate)
            tail = codec.backbone.tail(output.f3)
            features.append(codec.backbone.pool(tail[-1]))
            labels.append(batch.label)
            if split == "val":
                streams = codec.encode_batch(pictures[:10], rate)
                bits += sum(8 * sum(codec.describe(stream).layers.values()) for stream in streams)
                pixels += len(streams) * config.image_size**2
                pairs = zip((output.f3, *tail), (output.f2, *codec.backbone.tail(output.f2)), strict=True)
                errors = [float(F.mse_loss(ours, wanted) / wanted.square().mean()) for ours, wanted in pairs]
                weights = (stage.distortion, *stage.features)
                distortion += sum(scale * error for scale, error in zip(weights, errors, strict=True))
                batches += 1
        banks += [torch.cat(features), torch.cat(labels)]
    bpp, distortion = bits / pixels, distortion / batches
    return {
        "bpp": bpp,
        "distortion": distortion,
        "objective": weight * bpp + distortion,
        "knn": knn_accuracy(*banks),
    }


if __name__ == "__main__":
    with smoke.ended_by_sigterm():
        main()
