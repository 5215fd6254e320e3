"""Segmentation of latents beside segmentation of decoded pixels: Liu's Tables 2 and 3, in one run.

    python tests/benchmarks/compressed_domain.py [--image FILE] [--size 512 1024] [--transform deconv|res] [--repeat 7]
        [--threads 2] [--backbone resnet50] [--json FILE]

Latents of bmshj2018-hyperprior (quality 4, random weights scaled so that y has a deviation of one symbol and a half: times
depend on how many symbols there are and hardly on their values), batch 1. Encode is from pixels to bytes, decode + task from
bytes to the class of each pixel, both with the same coder. A row of chosen channels sends and computes with these alone.

Rows take turns, so that whatever else the machine does meets all of them; figures are medians. What is the same work in
every row (g_a, h_a and h_s of the encoder; all that follows the input of layer2) counts with its median over all rows.
Below the table: where the time goes, the aims, and the transforms' multiply-adds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))  # a test runs this file, too

import smoke
import torch
from compressai.zoo import image_models
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.io import ImageReadMode, decode_image

from data_pipeline.views import normalize
from downstream.compressai_latents import SeparableLatents, create_latents
from downstream.gate import create_gate
from downstream.tasks.deeplab import DeepLab, enlarge
from downstream.tasks.segmentation_network import SegmentationNetwork
from downstream.transform import NEW_TRANSFORMS, LatentTransform
from pretrain.codec.memory import keep_freed_memory

CLASSES = 19
STATIC = (16, 32, 64, 128)
PIXEL, DYNAMIC, NO_GATE = "pixel domain", "dynamic", "no gate"
ROWS = (PIXEL, DYNAMIC, *(f"static {count}" for count in STATIC), NO_GATE)
TAIL = "layer2..4, ASPP"
CONSOLE = Console(width=130)


class Clock:
    """Seconds of named parts, each a list over rounds; waits for a GPU."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: dict[str, list[float]] = defaultdict(list)

    def __call__(self, part: str, function: Callable[[], Any], networks: dict[str, nn.Module] | None = None) -> Any:
        """Time `function`, and as "PART: NAME" the networks that run in it; what these leave is "PART: other"."""
        hooks, inside, starts = [], defaultdict(float), {}
        for name, network in (networks or {}).items():

            def enter(*_: Any, name: str = name) -> None:
                starts[name] = self._now()

            def leave(*_: Any, name: str = name) -> None:
                inside[name] += self._now() - starts[name]

            hooks += [network.register_forward_pre_hook(enter), network.register_forward_hook(leave)]
        start = self._now()
        try:
            result = function()
        finally:
            for hook in hooks:
                hook.remove()
        whole = self._now() - start
        self.seconds[part].append(whole)
        if networks:
            for name in networks:
                self.seconds[f"{part}: {name}"].append(inside[name])
            self.seconds[f"{part}: other"].append(whole - sum(inside.values()))
        return result

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def create_codec(image: Tensor, device: torch.device) -> SeparableLatents:
    """The hyperprior with random weights, scaled; h_s gives scales that fit its latents."""
    torch.manual_seed(0)
    model: Any = image_models["bmshj2018-hyperprior"](quality=4).eval().requires_grad_(False)
    pixels = image[None].float() / 255
    model.g_a[-1].weight.mul_(1.5 / model.g_a(pixels).std())
    model.h_a[-1].weight.mul_(1.5 / model.h_a(model.g_a(pixels).abs()).std())
    model.h_s[-2].weight.mul_(0.1)
    model.h_s[-2].bias.fill_(1.5)
    latents = create_latents(model, device)
    assert isinstance(latents, SeparableLatents)
    return latents


def noise_image(height: int, width: int) -> Tensor:
    """Smooth coloured noise (3, height, width) uint8."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, height // 8, width // 8, generator=generator)
    fine = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic")
    return (fine + 0.05 * torch.randn(fine.shape, generator=generator)).clamp(0, 1).mul(255).byte()[0]


class Row:
    """One way from pixels to classes: its network and what it does at either end."""

    def __init__(self, name: str, latents: SeparableLatents, teacher: DeepLab, transform: str):
        self.name, self.latents, self.teacher = name, latents, teacher
        self.clock = Clock(latents.device)
        self.num_bytes = self.num_channels = 0
        if name == PIXEL:
            return
        kind, _, count = name.partition(" ")
        chosen = torch.randperm(latents.channels)[: int(count)].tolist() if kind == "static" else None
        gate = create_gate("none" if name == NO_GATE else kind, latents.channels, chosen)
        self.network = SegmentationNetwork(gate, transform, teacher).to(latents.device).eval().requires_grad_(False)

    def run(self, image: Tensor, tail_too: bool) -> None:
        """Pixels to the input of layer2, or to classes, by way of a stream; notes the time of each part."""
        height, width = image.shape[-2:]
        choice = None if self.name == PIXEL else self.network.input.gate.choice
        model = self.latents.model
        encoder = {name: getattr(model, name) for name in ("g_a", "h_a", "h_s")}
        if self.name == DYNAMIC:
            encoder["gate"] = self.network.input.gate.score
        stream = self.clock("encode", lambda: self.latents.encode(image, choice), encoder)
        self.num_bytes = len(stream)
        if self.name == PIXEL:
            pixels = self.clock(
                "bytes to pixels", lambda: self.latents.decode_image(stream), {"h_s": model.h_s, "g_s": model.g_s}
            )
            features = self.clock("stem, layer1", lambda: self.teacher.head(normalize(pixels)))
            self.num_channels, tail = self.latents.channels, self.teacher.tail
        else:
            received = self.clock("bytes to latents", lambda: self.latents.receive(stream), {"h_s": model.h_s})
            channels = received.channels if self.network.input.gate.num_inputs == self.latents.channels else None
            features = self.clock("transform", lambda: self.network.input.transform(received.latents, channels))
            self.num_channels, tail = received.latents.shape[1], self.network.tail
        if tail_too:
            self.clock(TAIL, lambda: enlarge(tail(features), height, width).argmax(dim=1))

    def seconds(self, *parts: str) -> float:
        """Median of the time of `parts` together."""
        return statistics.median(map(sum, zip(*(self.clock.seconds[part] for part in parts), strict=True)))

    @property
    def before_layer2(self) -> list[str]:
        """Parts between the bytes and the input of layer2."""
        return [part for part in self.clock.seconds if part not in ("encode", TAIL) and ":" not in part]


def multiply_adds(kind: str, channels: int, out_channels: int, height: int, width: int) -> int:
    """Of a transform over the latent of an image of height x width pixels."""
    counter = FlopCounterMode(display=False)
    with counter, torch.device("meta"):
        LatentTransform(kind, channels, out_channels)(torch.empty(1, channels, height // 16, width // 16))
    return counter.get_total_flops() // 2


def measure(rows: Sequence[Row], image: Tensor, repeat: int) -> None:
    """`repeat` rounds over all rows after one that warms up; in each, another row goes on to the classes."""
    with torch.inference_mode():
        for number in range(repeat + 1):
            for place, row in enumerate(rows):
                row.run(image, tail_too=number == 0 or number % len(rows) == place)
                if number == 0:
                    row.clock.seconds.clear()


def pooled(rows: Sequence[Row], part: str) -> float:
    """Median over all rows of a part that is the same work in each."""
    return statistics.median(seconds for row in rows for seconds in row.clock.seconds[part])


def small(folder: Path) -> list[str]:
    """Options of a tiny run."""
    return ["--size", "64", "128", "--backbone", "resnet18", "--repeat", "1", "--threads", "1"]


def create_parser() -> argparse.ArgumentParser:
    """Its options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", type=Path, help="its middle is taken; smooth noise where none is given")
    parser.add_argument("--size", type=int, nargs=2, default=(512, 1024), metavar=("H", "W"), help="multiples of 64")
    parser.add_argument("--transform", choices=NEW_TRANSFORMS, default="deconv")
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    smoke.add_option(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = create_parser()
    options = smoke.parse(parser, small, arguments)
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    height, width = options.size
    image = noise_image(height, width)
    if options.image is not None:
        found = decode_image(str(options.image), ImageReadMode.RGB)
        top, left = (found.shape[-2] - height) // 2, (found.shape[-1] - width) // 2
        if min(top, left) < 0 or height % 64 or width % 64:
            parser.error(f"--image is {tuple(found.shape[1:])}, --size {height} x {width} must be within it, in 64s")
        image = found[:, top : top + height, left : left + width].contiguous()
    device = torch.device(options.device)
    latents = create_codec(image, device)
    torch.manual_seed(1)
    teacher = DeepLab(options.backbone, CLASSES).to(device).eval().requires_grad_(False)
    rows = [Row(name, latents, teacher, options.transform) for name in ROWS]
    measure(rows, image, options.repeat)

    tail = pooled(rows, TAIL)
    networks = {part: pooled(rows, part) for part in ("encode: g_a", "encode: h_a", "encode: h_s")}
    pixel_features = rows[0].seconds(*rows[0].before_layer2)
    figures: dict[str, dict[str, float]] = {}
    table = Table(
        "model", "encode (s)", "decode + task (s)", "sum", "bytes to layer2 (s)", "of pixels'", "channels", "bytes"
    )
    for row in rows:
        features = row.seconds(*row.before_layer2)
        own = [part for part in ("encode: gate", "encode: other") if part in row.clock.seconds]
        encode = sum(networks.values()) + row.seconds(*own)
        figures[row.name] = {
            "encode": encode, "decode_and_task": features + tail, "sum": encode + features + tail,
            "to_layer2": features, "to_layer2_over_pixels": features / pixel_features,
            "channels": row.num_channels, "bytes": row.num_bytes,
            **{part: row.seconds(part) for part in row.clock.seconds if part not in ("encode", TAIL)}, **networks,
        }  # fmt: skip
        table.add_row(
            row.name, f"{encode:.3f}", f"{features + tail:.3f}", f"{encode + features + tail:.3f}", f"{features:.3f}",
            f"{features / pixel_features:.2f}", str(row.num_channels), str(row.num_bytes),
        )  # fmt: skip
    CONSOLE.print(f"{height} x {width}, {options.transform}, {options.backbone}, {device}, medians of {options.repeat}")
    CONSOLE.print(table)

    CONSOLE.print(f"where the time goes (s); other is coding and copying; {TAIL}: {tail:.3f} in every row")
    for row in rows:
        parts = [part for part in figures[row.name] if ":" in part or part in ("stem, layer1", "transform")]
        shown = ", ".join(f"{part.replace('bytes to ', '')} {figures[row.name][part]:.3f}" for part in parts)
        CONSOLE.print(f"  {row.name:<12} {shown}", highlight=False, soft_wrap=True)

    ratio = figures["static 16"]["to_layer2_over_pixels"]
    most = max(figures[name]["sum"] / figures[PIXEL]["sum"] for name in ROWS[1:])
    CONSOLE.print(f"bytes to layer2 at 16 channels: {ratio:.2f} of the pixel domain's (aim: at most 0.50)")
    CONSOLE.print(f"sum of both columns: at most {most:.2f} of the pixel domain's (aim: below 1 in every row)")
    macs = {
        kind: {f"{h}x{w}": multiply_adds(kind, latents.channels, teacher.channels, h, w) for h, w in sizes}
        for kind in NEW_TRANSFORMS
        for sizes in [((height, width), (1024, 2048))]
    }
    for size in macs["deconv"]:
        shown = ", ".join(f"{kind} {macs[kind][size] / 1e9:.1f} G" for kind in NEW_TRANSFORMS)
        times = macs["res"][size] / macs["deconv"][size]
        CONSOLE.print(f"multiply-adds at {size}, {latents.channels} channels: {shown}; res is {times:.2f} of deconv")
    if options.json:
        facts = {"rows": figures, "tail": tail, "multiply_adds": macs}
        options.json.write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
