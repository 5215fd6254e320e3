"""What the Karhunen-Loeve transform to begin with, context models and parts of the network are worth in a short training.

Trains the stage `codec` of recipe `evidence` several times from the backbone of one exported codec, in the same number
of steps: networks of random weights, networks that begin as the KLT of the features, the same with each context model,
and the last with the plain sum of the losses at all rates, without parts of the network, with the same learning rate for
all weights, and with wider latents. Prints at each trained rate real bits per pixel and the objective's distortion on
the validation split, and the BD-rate against the first at equal distortion.

    python tests/benchmarks/start.py --data data/tiny --init codec --out runs/start [--epochs 2] [--only KLT ...]
        [KEY=VALUE ...]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import smoke
from rich.console import Console
from rich.table import Table
from variants import measure

from downstream.evaluation.rate_accuracy import Curve, RatePoint, deltas
from pretrain.codec.feature_codec import FeatureCodec
from pretrain.export import export
from pretrain.run import resolve, run

STARTS = {
    "random weights": ["codec.context=none", "stages.codec.klt=false"],
    "KLT": ["codec.context=none"],
    "KLT, checkerboard": ["codec.context=checkerboard"],
    "KLT, space_channel": ["codec.context=space_channel"],
    "KLT, space_channel, rates not balanced": ["codec.context=space_channel", "stages.codec.balance=0"],
    "KLT, space_channel, hyperprior of convolutions": ["codec.context=space_channel", "codec.hyperprior=conv"],
    "KLT, space_channel, no gated convolutions": ["codec.context=space_channel", "codec.rgc_orders=[0,0,0]"],
    "KLT, space_channel, one learning rate": [
        "codec.context=space_channel",
        "stages.codec.lr=1e-3",
        "stages.codec.lr_fan_in=0",
    ],
    "KLT, space_channel, wide": [
        "codec.context=space_channel",
        "codec.transform_channels=96",
        "codec.latent_channels=192",
    ],
}


def small(folder: Path) -> list[str]:
    """Options of a tiny run."""
    runs = ["--data", str(smoke.scenes(folder)), "--init", str(smoke.codec(folder)), "--out", str(folder / "runs")]
    return [*smoke.NARROW, *runs, "--epochs", "1", "--only", "random weights", "KLT, checkerboard"]


def create_parser() -> argparse.ArgumentParser:
    """Its options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="data set with labels, a train and a val split")
    parser.add_argument("--init", type=Path, required=True, help="exported codec")
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs; those in it are gone on with")
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--only", nargs="+", choices=STARTS, default=list(STARTS), metavar="START", help="default: all")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("overrides", nargs="*", help="further options of each run, key=value")
    smoke.add_option(parser)
    return parser


def main() -> None:
    arguments = smoke.parse(create_parser(), small)

    figures: dict[str, list[dict[str, float]]] = {}
    for name in arguments.only:
        folder = arguments.out / name.replace(", ", "_").replace(" ", "_")
        fixed = [f"data={arguments.data}", f"init={arguments.init}", f"run={folder}", "launcher=local", "workers=1"]
        stage = ["init_parts=[backbone]", "only=[codec]", f"stages.codec.epochs={arguments.epochs:g}"]
        config = resolve("evidence", [*fixed, *stage, *arguments.overrides, *STARTS[name]])
        run(config)
        codec, weights = FeatureCodec.from_pretrained(export(folder, folder / "codec")), config.stages[-1].rates
        figures[name] = [
            {"rate": rate, **measure(config, codec, weight, rate)}
            for rate, weight in ((place / (len(weights) - 1), weight) for place, weight in enumerate(weights))
        ]

    table = Table("start", "rate", "bpp", "distortion", "kNN")
    for name, rows in figures.items():
        for row in rows:
            cells = (f"{row['rate']:g}", f"{row['bpp']:.4f}", f"{row['distortion']:.4f}", f"{100 * row['knn']:.1f} %")
            table.add_row(name, *cells)
    Console(width=110).print(table)
    curves = [
        Curve(name, "", tuple(RatePoint(f"{row['rate']:g}", row["bpp"], -row["distortion"]) for row in rows))
        for name, rows in figures.items()
    ]
    first = arguments.only[0]
    for curve, gain in deltas(curves, first):
        print(f"{curve.codec}: {gain.rate_text} of the bits of {first} at equal distortion {' '.join(gain.warnings)}")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    with smoke.ended_by_sigterm():
        main()
