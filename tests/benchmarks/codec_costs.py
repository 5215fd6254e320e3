"""What the codec takes of time and memory, beside CompressAI's mbt2018-mean (quality 4) and bmshj2018-hyperprior, in one run.

    python tests/benchmarks/codec_costs.py --data PHOTOS [--repeat 5] [--threads 2] [--only PART ...] [--json FILE]

PHOTOS is searched for an image. Parts, each with a table of its own and its figures in --json under its name:

    speed    512 x 768: encode, share of entropy coding, bytes to the input of layer2; multiply-adds; a profile
    memory   peak of encoding 1024 x 2048, each codec in a process of its own
    growth   encoding time per pixel from 256 x 256 to 2048 x 2048
    contexts 512 x 768, recipe `evidence`: what context models take of time

The first three are of the authors' widths (recipe dicm_resnet50) and of recipe `fast`. All have random weights whose
latents are scaled to a deviation of one, as are CompressAI's: times depend on how many symbols there are and hardly
on their values. CompressAI's decoder gives pixels, so stem and layer1 are added to it.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from codec import CONSOLE, begin, create_parser, our_codec, resized
from compressai.zoo import bmshj2018_hyperprior, mbt2018_mean
from rich.table import Table
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from data_pipeline.views import normalize
from pretrain.codec.config import CONTEXTS
from pretrain.codec.feature_codec import FeatureCodec

PARTS = ("speed", "memory", "growth", "contexts")
OURS = ("dicm", "dicm bf16", "fast", "fast bf16")
THEIRS = {"mbt2018-mean": mbt2018_mean, "bmshj2018-hyperprior": bmshj2018_hyperprior}


class TheirCodec(nn.Module):
    """A CompressAI model with random weights scaled alike, and the head of a ResNet-50 that reads its pixels."""

    def __init__(self, name: str, image: Tensor, head: Callable[[Tensor], Tensor]):
        super().__init__()
        torch.manual_seed(0)
        self.model = THEIRS[name](quality=4, pretrained=False).eval().requires_grad_(False)
        self._head = (head,)
        images = image[None].float() / 255
        with torch.inference_mode():
            self.model.g_a[-1].weight.div_(self.model.g_a(images).std())
            y = self.model.g_a(images)
            z_of = (lambda y: self.model.h_a(y)) if name == "mbt2018-mean" else (lambda y: self.model.h_a(y.abs()))
            self.model.h_a[-1].weight.div_(z_of(y).std())
        self.model.update(force=True)

    @torch.inference_mode()
    def encode(self, image: Tensor) -> dict[str, Any]:
        """Their streams and shape; sides are multiples of 64 here."""
        return self.model.compress(image[None].float() / 255)

    @torch.inference_mode()
    def decode(self, stream: dict[str, Any]) -> Tensor:
        """Pixels, then the input of layer2."""
        pixels = self.model.decompress(stream["strings"], stream["shape"])["x_hat"]
        return self._head[0](normalize(pixels))


def create(name: str, image: Tensor) -> FeatureCodec | TheirCodec:
    """A codec by name."""
    return our_codec(name, image) if name in OURS else TheirCodec(name, image, our_codec("dicm", image).backbone.head)


def milliseconds(function: Callable[[], Any], repeat: int) -> float:
    """Median of `repeat` runs after one that warms up."""
    function()
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        function()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def measure_speed(image: Tensor, repeat: int) -> dict[str, Any]:
    """Times and multiply-adds of one image of 512 x 768."""
    figures: dict[str, Any] = {}
    for name in (*OURS, *THEIRS):
        codec = create(name, image)
        stream = codec.encode(image)
        row = {
            "encode_ms": milliseconds(lambda c=codec: c.encode(image), repeat),
            "decode_ms": milliseconds(lambda c=codec, s=stream: c.decode(s), repeat),
            "encode_gmac": gmac(lambda c=codec: c.encode(image)),
            "decode_gmac": gmac(lambda c=codec, s=stream: c.decode(s)),
        }
        if isinstance(codec, FeatureCodec):
            with codec._coding(), torch.inference_mode():
                y2, z = (latent.float() for latent in codec.analyse(normalize(image[None].float() / 255)))
            coder = codec._ready()
            symbols = (
                coder.predict(torch.zeros_like(z).int(), [None]),
                torch.round(z)[0].int(),
                torch.round(y2)[0].int(),
            )
            predicted, z_symbols, y2_symbols = symbols
            layers = (z_symbols, y2_symbols, predicted.indexes[0], predicted.close[0])
            row["coding_ms"] = milliseconds(lambda c=coder, p=layers: c._layers(*p), repeat)
        figures[name] = row
        if name == "dicm":
            figures["profile"] = profiled(lambda c=codec: c.encode(image))
    table = Table("codec", "encode ms", "to layer2 ms", "coding ms", "share", "encode GMAC", "decode GMAC",
                  title="speed at 512 x 768, medians")  # fmt: skip
    for name in (*OURS, *THEIRS):
        row = figures[name]
        coding = row.get("coding_ms")
        table.add_row(
            name, f"{row['encode_ms']:.0f}", f"{row['decode_ms']:.0f}", f"{coding:.1f}" if coding else "",
            f"{100 * coding / row['encode_ms']:.1f} %" if coding else "", f"{row['encode_gmac']:.1f}",
            f"{row['decode_gmac']:.1f}",
        )  # fmt: skip
    CONSOLE.print(table)
    for name in OURS:
        ratios = {
            key: figures[name][f"{key}_ms"] / figures["mbt2018-mean"][f"{key}_ms"] for key in ("encode", "decode")
        }
        figures[name]["ratios"] = ratios
        print(f"{name} over mbt2018-mean: encode {ratios['encode']:.2f}, bytes to layer2 {ratios['decode']:.2f}")
    print(figures["profile"])
    return figures


def gmac(function: Callable[[], Any]) -> float:
    """Multiply-adds, in 10^9."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops() / 2e9


def profiled(function: Callable[[], Any]) -> str:
    """The operators that take most of the time."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        function()
    return profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=10, max_name_column_width=48)


def measure_memory(data: Path) -> dict[str, float]:
    """Peak MiB above what the loaded codec takes, of encoding 1024 x 2048; `tile` is ours in tiles of 512."""
    figures = {}
    for name, tile in (("dicm", 0), ("dicm bf16", 0), ("dicm", 512), ("fast", 0), ("mbt2018-mean", 0)):
        command = [sys.executable, __file__, "--data", str(data), "--peak-of", name, "--tile", str(tile)]
        out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        figures[name + (" tile" if tile else "")] = float(out.splitlines()[-1])
    table = Table("codec", "MiB", title="memory: peak of encoding 1024 x 2048, above the loaded codec")
    for name, value in figures.items():
        table.add_row(name, f"{value:.0f}")
    CONSOLE.print(table)
    return figures


def peak_of(name: str, image: Tensor, tile: int) -> float:
    """Peak MiB of this process while `name` encodes, above what it had before."""
    codec = create(name, resized(image, 256, 256))
    codec.encode(resized(image, 64, 64))
    large = resized(image, 1024, 2048)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    codec.encode(large, **({"tile": tile} if tile else {}))
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def measure_growth(image: Tensor) -> dict[str, float]:
    """Nanoseconds a pixel of encoding, by side; decoding beside it."""
    codec = our_codec("dicm", resized(image, 256, 256))
    figures: dict[str, float] = {}
    table = Table("side", "encode ns/pixel", "decode ns/pixel", title="growth")
    for side, repeat in ((256, 9), (512, 5), (1024, 3), (2048, 1)):
        picture = resized(image, side, side)
        stream = codec.encode(picture)
        encode = 1e6 * milliseconds(lambda p=picture: codec.encode(p), repeat) / side**2
        decode = 1e6 * milliseconds(lambda s=stream: codec.decode(s), repeat) / side**2
        figures[f"encode_{side}"], figures[f"decode_{side}"] = encode, decode
        table.add_row(str(side), f"{encode:.0f}", f"{decode:.0f}")
    CONSOLE.print(table)
    ratio = figures["encode_2048"] / figures["encode_256"]
    print(f"per pixel, 2048 over 256: encode {ratio:.2f}, decode {figures['decode_2048'] / figures['decode_256']:.2f}")
    return figures


def measure_contexts(image: Tensor, repeat: int) -> dict[str, dict[str, float]]:
    """Times of one image of 512 x 768 by context model."""
    figures: dict[str, dict[str, float]] = {}
    table = Table("context", "encode ms", "decode ms", "encode over none", "decode over none", title="context models")
    for context in CONTEXTS:
        codec = our_codec("evidence", image, f"codec.context={context}")
        stream = codec.encode(image)
        row = {
            "encode_ms": milliseconds(lambda c=codec: c.encode(image), repeat),
            "decode_ms": milliseconds(lambda c=codec, s=stream: c.decode(s), repeat),
        }
        figures[context] = row
        ratios = (f"{row[key] / figures['none'][key]:.2f}" for key in row)
        table.add_row(context, *(f"{each:.0f}" for each in row.values()), *ratios)
    CONSOLE.print(table)
    return figures


def main() -> None:
    """Measure, print, write the figures."""
    parser = create_parser(__doc__, PARTS)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    parser.add_argument("--tile", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    (image,) = begin(options, 1)
    if options.peak_of:
        print(peak_of(options.peak_of, image, options.tile))
        return
    standard = resized(image, 512, 768)
    parts: dict[str, Callable[[], Any]] = {
        "speed": lambda: measure_speed(standard, options.repeat),
        "memory": lambda: measure_memory(options.data),
        "growth": lambda: measure_growth(image),
        "contexts": lambda: measure_contexts(standard, options.repeat),
    }
    figures = {part: parts[part]() for part in options.only}
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
