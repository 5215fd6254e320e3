"""How far a network's answers move when it reads f3 of a codec in place of f1, by rate.

    python tests/benchmarks/divergence.py RUN CODEC [CODEC ...] [--limit 1500] [--json FILE]

RUN is a complete classification with input=pixels on one of the codecs' backbone, frozen here. Prints for each codec and
rate: estimated bits per pixel, the mean Kullback-Leibler divergence of the answers from those on f1 and how often the
likeliest class stays, over the validation split and as evenly spread training images as --limit says, and top-1 on the
validation split. Every image tells how its answer moves, so fewer images settle a difference than top-1 needs.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import smoke
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from data_pipeline.loader import CanvasDataset, collate
from data_pipeline.views import center_images, normalize
from downstream.evaluation.points import DEFAULT_RATES
from downstream.predict import load_task
from pretrain.codec.feature_codec import FeatureCodec

BATCH = 250


def small(folder: Path) -> list[str]:
    """Options of a tiny run."""
    data, narrow = smoke.scenes(folder), smoke.codec(folder)
    return [str(smoke.classification(folder / "run", narrow, data, "input=pixels")), str(narrow), "--limit", "4"]


def create_parser() -> argparse.ArgumentParser:
    """Its options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("codecs", nargs="+", type=Path)
    parser.add_argument("--limit", type=int, default=1500, help="most training images, evenly spread; %(default)s")
    parser.add_argument("--json", type=Path, help="file for the figures")
    smoke.add_option(parser)
    return parser


def main() -> None:
    arguments = smoke.parse(create_parser(), small)

    task = load_task("classification", arguments.run)
    config, network = task.config, task.model
    images, labels = load(config, config.val_split, None)
    train_images, _ = load(config, config.train_split, arguments.limit)
    images = torch.cat([images, train_images])
    table = Table("codec", "rate", "bpp", "divergence", "same answer", "top-1")
    rows = []
    for folder in arguments.codecs:
        for row in measure(FeatureCodec.from_pretrained(folder), network, images, labels):
            rows.append({"codec": str(folder), **row})
            rate = "" if row["rate"] is None else f"{row['rate']:g}"
            shares = (f"{100 * row[key]:.1f} %" for key in ("same", "top1"))
            table.add_row(str(folder), rate, f"{row['bpp']:.4f}", f"{row['divergence']:.3f}", *shares)
    Console(width=140).print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


def load(config: Any, split: str, limit: int | None) -> tuple[Tensor, Tensor]:
    """Normalised middles of a split's images, and labels; at most `limit` of them, evenly spread."""
    data = CanvasDataset(config.data, split, config.canvas_size)
    step = 1 if limit is None else math.ceil(len(data) / limit)
    batch = collate([data[index] for index in range(0, len(data), step)])
    images = center_images(batch.canvas, batch.aspect, config.image_size)
    return normalize(images.float() / 255), batch.label


@torch.no_grad()
def measure(codec: FeatureCodec, network: nn.Module, images: Tensor, labels: Tensor) -> list[dict[str, Any]]:
    """A row for each rate; `labels` are those of the first images."""
    clean = torch.cat([network(codec.backbone.head(batch)) for batch in images.split(BATCH)]).log_softmax(dim=1)
    rows = []
    for rate in DEFAULT_RATES if codec.config.rate_points > 1 else (None,):
        outputs = [(output.bits, network(output.f3)) for output in (codec(x, rate) for x in images.split(BATCH))]
        bits, logits = (torch.cat(parts) for parts in zip(*outputs, strict=True))
        answers = logits.log_softmax(dim=1)
        rows.append(
            {
                "rate": rate,
                "bpp": float(bits.mean()) / (images.shape[-2] * images.shape[-1]),
                "divergence": float(nn.functional.kl_div(answers, clean, log_target=True, reduction="batchmean")),
                "same": float((answers.argmax(1) == clean.argmax(1)).float().mean()),
                "top1": float((answers[: len(labels)].argmax(1) == labels).float().mean()),
            }
        )
    return rows


if __name__ == "__main__":
    main()
