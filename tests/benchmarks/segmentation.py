"""Semantic segmentation of latents: does training work, and does it beat what needs none?

    python tests/benchmarks/segmentation.py --data CAMVID --codec CODEC --out runs/segmentation [--epochs 10]
        [--short-side 120] [--only layers|codec|hyperprior|static|overfit ...] [--json FILE]

For y2 of the codec and for y of a bmshj2018-hyperprior with random weights (which keep the image, as its latents are wide):
a student with a dynamic gate is trained beside a teacher on raw images. Printed: the loss of the first and last epoch,
mIoU on the validation split from real streams, bits, channels; the same of the network before training, and of the most
frequent class everywhere. `static` trains on the 16 channels that the codec's dynamic gate chose most often. `overfit` trains
on eight images alone and compares with what logits at an eighth of the resolution can say: the true masks reduced to it.
`layers` codes every fourth validation image at its own size in two layers and in one, and checks that both give the same latent.

A short training on small images shows that all parts learn together, not what mIoU the method reaches.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from compressai.zoo import image_models
from downstream.tasks.masked_images import IGNORE, MaskedImages
from downstream.tasks.segmentation_run import SegmentationRun
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from data_pipeline.shards import Manifest, ShardReader, ShardWriter, Split
from downstream.channels import select_channels
from downstream.latents import LatentCodec
from downstream.tasks.semantic_segmentation import SegmentationConfig, SegmentationMetric, create_latent_codec

PARTS = ("layers", "codec", "hyperprior", "static", "overfit")
HYPERPRIOR = "bmshj2018-hyperprior"
CONSOLE = Console(width=120)


def random_weights(path: Path, images: torch.Tensor) -> Path:
    """A file of random weights of the hyperprior whose latents of `images` have a deviation of three symbols."""
    if not path.is_file():
        torch.manual_seed(0)
        model = image_models[HYPERPRIOR](quality=1).requires_grad_(False)
        pixels = images.float() / 255
        model.g_a[-1].weight.mul_(3 / model.g_a(pixels).std())
        model.h_a[-1].weight.mul_(3 / model.h_a(model.g_a(pixels).abs()).std())
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)
    return path


def first_samples(source: str, out: Path, count: int) -> Path:
    """A data set whose train and val split both are the first `count` training samples of `source`."""
    if not (out / "dataset.json").is_file():
        manifest = Manifest.load(source)
        reader, splits = ShardReader(source, manifest.split("train")), {}
        out.mkdir(parents=True, exist_ok=True)
        for split in ("train", "val"):
            with ShardWriter(out, split) as writer:
                for index in range(count):
                    sample = reader.read(index)
                    writer.write({**sample, "json": json.loads(sample["json"])})
            splits[split] = Split(tuple(writer.shards))
        replace(manifest, name=f"{manifest.name}, first {count}", splits=splits).save(out)
    return out


def best_possible(dataset: MaskedImages) -> float:
    """mIoU of the true masks reduced to an eighth and enlarged again: what the logits' resolution allows."""
    metric = SegmentationMetric(len(dataset.classes))
    for index in range(len(dataset)):
        mask = dataset[index][1].long()
        known = torch.where(mask == IGNORE, len(dataset.classes), mask)
        planes = F.one_hot(known, len(dataset.classes) + 1).permute(2, 0, 1)[None, :-1].float()
        size = [-(-side // 8) for side in mask.shape]
        reduced = F.interpolate(F.interpolate(planes, size, mode="area"), mask.shape, mode="bilinear")
        metric.update(reduced.argmax(dim=1), mask[None])
    return metric.results()["miou"]


def trained(config: SegmentationConfig) -> dict[str, Any]:
    """Results of a training, and of its network before it; those of a run that is complete are read."""
    done = Path(config.run) / "figures.json"
    if done.is_file():
        return json.loads(done.read_text())
    config.validate()
    run = SegmentationRun(config)
    untrained = run.evaluate(run.new_student(run.teacher()))["miou"]
    results = {**run.train(log), "untrained_miou": untrained}
    done.write_text(json.dumps(results, indent=2) + "\n")
    return results


def layer_sizes(latents: LatentCodec, images: Sequence[torch.Tensor]) -> dict[str, dict[str, float]]:
    """Mean bytes of the base, of both layers and of one, and the last two's ratio, by the number of channels in base."""
    streams = [latents.encode(image) for image in images]
    whole = [latents.decode(stream) for stream in streams]
    sizes: dict[str, dict[str, float]] = {}
    for count in (16, 64):
        chosen, base, both = list(range(0, latents.channels, latents.channels // count))[:count], 0, 0
        for image, y_hat in zip(images, whole, strict=True):
            layered = latents.encode(image, chosen, rest=True)
            assert torch.equal(latents.decode(layered), y_hat)
            base, both = base + len(latents.split(layered)[0]), both + len(layered)
        single = sum(map(len, streams))
        means = {"base": base / len(images), "both": both / len(images), "single": single / len(images)}
        sizes[str(count)] = {**means, "over": both / single}
    return sizes


def print_layers(figures: dict[str, Any]) -> None:
    """What two layers cost."""
    table = Table("latents", "channels in base", "base, bytes", "base + rest", "one layer", "over")
    for name, sizes in figures.items():
        for count, row in sizes.items():
            cells = [f"{row[key]:.0f}" for key in ("base", "both", "single")]
            table.add_row(name, count, *cells, f"{100 * (row['over'] - 1):+.2f} %")
    CONSOLE.print(table)


def log(stage: str, epoch: int, loss: float) -> None:
    """One line an epoch."""
    CONSOLE.print(f"  {stage} epoch {epoch}: loss {loss:.4f}", highlight=False)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the parts that are not done yet and print a table of all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--codec", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--overfit-epochs", type=int, default=150)
    parser.add_argument("--short-side", type=int, default=120)
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)

    whole = MaskedImages(options.data, "train", options.short_side)
    height, width = whole[0][0].shape[-2:]
    base = SegmentationConfig(
        data=options.data, run=str(options.out / "teacher"), codec=options.codec, backbone=options.backbone,
        height=height, width=width, short_side=options.short_side, scale_min=0.75, scale_max=1.5,
        epochs=options.epochs, teacher_epochs=options.epochs, batch_size=4,
    )  # fmt: skip
    weights = random_weights(options.out / "hyperprior.safetensors", torch.stack([whole[i][0] for i in range(4)]))
    theirs = {"codec": None, "latents": HYPERPRIOR, "weights": str(weights), "start": "random"}
    figures: dict[str, dict[str, Any]] = {}
    if "layers" in options.only:
        val = MaskedImages(options.data, "val")
        images = [val[index][0] for index in range(0, len(val), 4)]
        sources = {"codec": base, HYPERPRIOR: replace(base, **theirs)}
        device = torch.device("cpu")
        layers = {name: layer_sizes(create_latent_codec(one, device), images) for name, one in sources.items()}
        print_layers(layers)
        if options.json:
            options.json.write_text(json.dumps({"layers": layers}, indent=2) + "\n")
    if set(options.only) == {"layers"}:
        return
    base.teacher = str(options.out / "teacher" / "teacher.pt")
    if not Path(base.teacher).is_file():
        Path(base.run).mkdir(parents=True, exist_ok=True)
        SegmentationRun(replace(base, teacher=None)).teacher(log)
    if "codec" in options.only:
        figures["codec"] = trained(replace(base, run=str(options.out / "codec")))
    if "hyperprior" in options.only:
        figures["hyperprior"] = trained(replace(base, run=str(options.out / "hyperprior"), **theirs))
    if "static" in options.only:
        chosen, chart = select_channels(options.out / "codec", 16)
        CONSOLE.print(f"wrote {chosen}, {chart}")
        static = {"gate": "static", "channels": str(chosen)}
        figures["static"] = trained(replace(base, run=str(options.out / "static"), **static))
    if "overfit" in options.only:
        eight = first_samples(options.data, options.out / "eight", 8)
        few = {"data": str(eight), "gate": "none", "batch_size": 8, "epochs": options.overfit_epochs}
        scale = {"scale_min": 1.0, "scale_max": 1.0}
        figures["overfit"] = trained(replace(base, run=str(options.out / "overfit"), **few, **scale))
        figures["overfit"]["best_miou"] = best_possible(MaskedImages(eight, "val", options.short_side))

    table = Table(
        "latents", "loss, first epoch", "last", "mIoU", "before training", "constant", "best", "bpp", "channels"
    )
    for name, row in figures.items():
        best = f"{row['best_miou']:.3f}" if "best_miou" in row else ""
        table.add_row(
            name, f"{row['loss_first']:.3f}", f"{row['loss_last']:.3f}", f"{row['miou']:.3f}",
            f"{row['untrained_miou']:.3f}", f"{row['constant_miou']:.3f}", best, f"{row['bpp']:.4f}",
            f"{row['channels']:.1f}",
        )  # fmt: skip
    CONSOLE.print(table)
    if options.json:
        found = {"layers": layers} if "layers" in options.only else {}
        facts = {**found, "training": figures}
        options.json.write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
