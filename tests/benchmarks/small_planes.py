"""Convolutions over small planes as matrix products, beside torch's own: time of a forward and backward pass.

    python tests/benchmarks/small_planes.py [--backbone resnet18] [--batch 64] [--threads 1] [--repeat 5] [--json FILE]

First single 3x3 convolutions by channels and places, with the product even where a network would not take it, then a
whole backbone as it is, at several sizes of images. The two sides take turns; medians of the processor's time, and the ratio of torch's to the product's. Figures in --json: `convolutions`
and `backbone`, each a list with `torch_ms` and `product_ms`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import smoke
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from pretrain.codec import small_planes
from pretrain.codec.backbone import Backbone
from pretrain.codec.small_planes import SmallPlaneConv2d

CONVOLUTIONS = [(256, 256, 1, 2), (256, 256, 1, 4), (256, 512, 2, 4), (512, 512, 1, 1), (512, 512, 1, 2), (512, 512, 1, 3),
                (512, 512, 1, 4), (512, 512, 1, 5), (512, 512, 1, 7)]  # fmt: skip
SIZES = (32, 64, 96, 128, 224)  # pixels of the backbone's images


def small(folder: Path) -> list[str]:
    """Options of a tiny run."""
    return ["--batch", "2", "--repeat", "1"]


def create_parser() -> argparse.ArgumentParser:
    """Its options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", type=Path)
    smoke.add_option(parser)
    return parser


def main() -> None:
    arguments = smoke.parse(create_parser(), small)
    torch.set_num_threads(arguments.threads)
    console = Console(width=100)
    figures: dict[str, list[dict[str, float | int]]] = {"convolutions": [], "backbone": []}

    shown = Table("channels", "stride", "plane", "torch, ms", "product, ms", "ratio")
    for channels, width, stride, side in CONVOLUTIONS:
        module = SmallPlaneConv2d(channels, width, 3, stride=stride, padding=1, bias=False)
        module = module.to(memory_format=torch.channels_last)
        images = torch.randn(arguments.batch, channels, side, side).contiguous(memory_format=torch.channels_last)
        ours, theirs = compare(module, images, arguments.repeat, everywhere=True)
        shown.add_row(f"{channels} to {width}", str(stride), f"{side}x{side}", *texts(theirs, ours))
        figures["convolutions"].append(
            {"in": channels, "out": width, "stride": stride, "side": side, "torch_ms": theirs, "product_ms": ours}
        )
    console.print(shown)

    shown = Table(arguments.backbone, "torch, ms", "product, ms", "ratio")
    backbone = Backbone(arguments.backbone).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for size in SIZES:
        count = max(1, min(arguments.batch, arguments.batch * 64**2 // size**2))
        images = torch.randn(count, 3, size, size).contiguous(memory_format=torch.channels_last)
        ours, theirs = compare(backbone, images, arguments.repeat)
        shown.add_row(f"{count} images of {size} px", *texts(theirs, ours))
        figures["backbone"].append({"size": size, "images": count, "torch_ms": theirs, "product_ms": ours})
    console.print(shown)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


def compare(network: torch.nn.Module, images: Tensor, repeat: int, everywhere: bool = False) -> tuple[float, float]:
    """Milliseconds of a pass with products where a network takes them, or everywhere, and without any."""
    images = images.requires_grad_(True)

    def step() -> None:
        images.grad = None
        network.zero_grad(set_to_none=True)
        network(images).square().mean().backward()

    ours, theirs = [], []
    for _ in range(repeat + 1):  # the first to warm up
        ours.append(taken(step, products=True if everywhere else None))
        theirs.append(taken(step, products=False))
    return 1e3 * statistics.median(ours[1:]), 1e3 * statistics.median(theirs[1:])


def taken(step: Callable[[], None], products: bool | None) -> float:
    """Seconds of the processor; `products` says whether they are taken, None leaves it to the network."""
    most = {None: small_planes.MOST_PLACES, False: 0, True: sys.maxsize}[products]
    with mock.patch.object(small_planes, "MOST_PLACES", most):
        start = time.process_time()
        step()
        return time.process_time() - start


def texts(theirs: float, ours: float) -> tuple[str, str, str]:
    return f"{theirs:.1f}", f"{ours:.1f}", f"{theirs / ours:.2f}"


if __name__ == "__main__":
    main()
