"""What a pretrained codec keeps of real photographs, against the same codec with random weights and against JPEG.

Prints, for each input: real bits per pixel on the validation split, kNN accuracy of the frozen features (pooled
layer4) and linear-probe accuracy. Features come from real streams and files, decoded. For JPEG the same pretrained
backbone reads the decoded pixels, without the codec in its middle.

    python tests/benchmarks/first_run.py --data data/tiny --codec codec [--json figures.json]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import smoke
import torch
from rich.console import Console
from rich.table import Table

from data_pipeline.loader import eval_loader
from data_pipeline.views import center_images
from downstream import finetune
from downstream.evaluation.anchors import create_anchor
from downstream.frozen import FrozenCodec, PixelInput
from pretrain.codec.feature_codec import FeatureCodec
from pretrain.ssl.evaluation import knn_accuracy

BATCH = 100
PROBE = ["probe=true", "launcher=local"]


def small(folder: Path) -> list[str]:
    """Options of a tiny run."""
    inputs = ["--data", str(smoke.scenes(folder)), "--codec", str(smoke.codec(folder))]
    return [*inputs, "epochs=1", "batch_size=8"]


def create_parser() -> argparse.ArgumentParser:
    """Its options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="data set with labels, a train and a val split")
    parser.add_argument("--codec", type=Path, required=True, help="exported codec")
    parser.add_argument("overrides", nargs="*", help="further options of each probe, key=value")
    parser.add_argument("--seed", type=int, default=0, help="of the random codec's weights")
    parser.add_argument("--json", type=Path, help="file for the figures")
    smoke.add_option(parser)
    return parser


def main() -> None:
    arguments = smoke.parse(create_parser(), small)
    trained = FeatureCodec.from_pretrained(arguments.codec)
    size, canvas = trained.extra["image_size"], trained.extra["canvas_size"]

    figures = {}
    with tempfile.TemporaryDirectory() as scratch:
        random_codec = Path(scratch) / "random"
        torch.manual_seed(arguments.seed)
        FeatureCodec(trained.config).eval().save_pretrained(random_codec, {"image_size": size, "canvas_size": canvas})
        device = torch.device("cpu")
        sources = {
            "trained codec": (FrozenCodec(trained, device), arguments.codec, []),
            "random codec": (FrozenCodec(FeatureCodec.from_pretrained(random_codec), device), random_codec, []),
        }
        for quality in (1, 10):
            options = ["input=pixels", f"anchor=jpeg:{quality}"]
            anchor = create_anchor(f"jpeg:{quality}")
            sources[f"jpeg {quality}"] = (PixelInput(trained.backbone.head, anchor, device), arguments.codec, options)
        sources["clean pixels"] = (PixelInput(trained.backbone.head, None, device), arguments.codec, ["input=pixels"])
        for name, (source, codec, options) in sources.items():
            start = time.perf_counter()
            figures[name] = knn_of(
                source, trained if "random" not in name else source.codec, arguments.data, size, canvas
            )
            overrides = [f"codec={codec}", f"data={arguments.data}", f"run={scratch}/{name.replace(' ', '_')}"]
            config = finetune.resolve("classification", [*overrides, *options, *PROBE, *arguments.overrides])
            results = finetune.run(config)
            figures[name] |= {"probe": results["top1"], "bpp": results["bpp"], "bpp_payload": results["bpp_payload"]}
            figures[name]["seconds"] = time.perf_counter() - start

    table = Table("features from", "bpp, whole files", "bpp, payload", "kNN", "linear probe", "seconds")
    for name, row in figures.items():
        table.add_row(
            name, f"{row['bpp']:.3f}", f"{row['bpp_payload']:.3f}", f"{100 * row['knn']:.1f} %",
            f"{100 * row['probe']:.1f} %", f"{row['seconds']:.0f}",
        )  # fmt: skip
    Console(width=110).print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


@torch.inference_mode()
def knn_of(
    source: FrozenCodec | PixelInput, codec: FeatureCodec, data: Path, size: int, canvas: int
) -> dict[str, float]:
    """kNN accuracy of val against train, features of both decoded from real bytes."""
    banks: list[torch.Tensor] = []
    for split in ("train", "val"):
        features, labels = [], []
        for batch in eval_loader(data, split, canvas_size=canvas, batch_size=BATCH):
            decoded, _, _ = source.through_streams(center_images(batch.canvas, batch.aspect, size))
            features.append(codec.backbone.pool(codec.backbone.tail(decoded)[-1]))
            labels.append(batch.label)
        banks += [torch.cat(features), torch.cat(labels)]
    return {"knn": knn_accuracy(*banks)}


if __name__ == "__main__":
    with smoke.ended_by_sigterm():
        main()
