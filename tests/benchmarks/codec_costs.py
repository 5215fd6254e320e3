"""What the codec takes of time and memory, beside CompressAI's mbt2018-mean (quality 4) and bmshj2018-hyperprior, in one run.

    python tests/benchmarks/codec_costs.py --data PHOTOS [--repeat 5] [--threads 2] [--only PART ...] [--json FILE]

PHOTOS is searched for an image. Parts, each with a table of its own and its figures in --json under its name:

    speed    --size: encode, share of entropy coding, bytes to the input of layer2; multiply-adds; a profile
    memory   peak of encoding --large, each codec in a process of its own
    growth   encoding time per pixel at squares of --sides
    contexts --size, recipe `evidence`: what context models take of time

The first three are of the authors' widths (recipe dicm_resnet50) and of recipe `fast`. All have random weights whose
latents are scaled to a deviation of one, as are CompressAI's: times depend on how many symbols there are and hardly
on their values. CompressAI's decoder gives pixels, so stem and layer1 are added to it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import smoke
import torch
from codec import CONSOLE, begin, common_parser, our_codec, resized
from compressai.zoo import bmshj2018_hyperprior, mbt2018_mean
from rich.table import Table
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from data_pipeline.views import normalize
from pretrain.codec import bitstream
from pretrain.codec.backbone import crop_to
from pretrain.codec.coder import LATENT_STRIDE, Z_STRIDE, StreamCoder, guarded
from pretrain.codec.config import CONTEXTS
from pretrain.codec.entropy import CoderTables
from pretrain.codec.feature_codec import FeatureCodec
from pretrain.codec.symbols import Part, SymbolDecoder, encode_symbols

PARTS = ("speed", "memory", "growth", "contexts")
OURS = ("dicm", "dicm bf16", "fast", "fast bf16")
BASE = "mbt2018-mean"
THEIRS = {BASE: mbt2018_mean, "bmshj2018-hyperprior": bmshj2018_hyperprior}


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


def symbols_of(codec: FeatureCodec, stream: bytes) -> list[Part]:
    """What the entropy coder was given for a stream of one layer: tables, symbols and indexes of z and of y2."""
    tables = CoderTables.build(codec.entropy)
    coder = StreamCoder(codec.config, codec.entropy, codec.h_s, None, None, tables, codec.fingerprint)
    info, (layer,) = bitstream.unpack(stream, codec.fingerprint)
    height, width = (-(-side // Z_STRIDE) for side in (info.height, info.width))
    z_indexes = torch.arange(coder.z_channels, dtype=torch.int32).repeat_interleave(height * width)
    places = -(-info.height // LATENT_STRIDE) * -(-info.width // LATENT_STRIDE)
    reader = SymbolDecoder(layer.payload, z_indexes.numel() + places * coder.latent_channels)
    z_symbols = reader.read(tables.z, z_indexes)
    predicted = coder.predict(z_symbols.view(1, -1, height, width), [None])
    y2_indexes = guarded(crop_to(predicted.indexes[0], info.height, info.width, LATENT_STRIDE).flatten(), layer)
    parts = [(tables.z, z_symbols, z_indexes), (tables.y2, reader.read(tables.y2, y2_indexes), y2_indexes)]
    assert encode_symbols(parts) == layer.payload
    return parts


def measure_speed(image: Tensor, codecs: Sequence[str], repeat: int) -> dict[str, Any]:
    """Times and multiply-adds of one image, of our codecs and of theirs."""
    figures: dict[str, Any] = {}
    ours = [name for name in codecs if name in OURS]
    for name in codecs:
        codec = create(name, image)
        stream = codec.encode(image)
        row = {
            "encode_ms": milliseconds(lambda c=codec: c.encode(image), repeat),
            "decode_ms": milliseconds(lambda c=codec, s=stream: c.decode(s), repeat),
            "encode_gmac": gmac(lambda c=codec: c.encode(image)),
            "decode_gmac": gmac(lambda c=codec, s=stream: c.decode(s)),
        }
        if isinstance(codec, FeatureCodec):
            parts = symbols_of(codec, stream)
            row["coding_ms"] = milliseconds(lambda p=parts: encode_symbols(p), repeat)
        figures[name] = row
        if name == ours[0]:
            figures["profile"] = profiled(lambda c=codec: c.encode(image))
    table = Table("codec", "encode ms", "to layer2 ms", "coding ms", "share", "encode GMAC", "decode GMAC",
                  title=f"speed at {image.shape[1]} x {image.shape[2]}, medians")  # fmt: skip
    for name in codecs:
        row = figures[name]
        coding = row.get("coding_ms")
        table.add_row(
            name, f"{row['encode_ms']:.0f}", f"{row['decode_ms']:.0f}", f"{coding:.1f}" if coding else "",
            f"{100 * coding / row['encode_ms']:.1f} %" if coding else "", f"{row['encode_gmac']:.1f}",
            f"{row['decode_gmac']:.1f}",
        )  # fmt: skip
    CONSOLE.print(table)
    for name in ours if BASE in codecs else ():
        ratios = {key: figures[name][f"{key}_ms"] / figures[BASE][f"{key}_ms"] for key in ("encode", "decode")}
        figures[name]["ratios"] = ratios
        print(f"{name} over {BASE}: encode {ratios['encode']:.2f}, bytes to layer2 {ratios['decode']:.2f}")
    print(figures.get("profile", ""))
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


def measure_memory(options: argparse.Namespace) -> dict[str, float]:
    """Peak MiB above what the loaded codec takes, of encoding; `tile` is ours in tiles of 512."""
    context, figures = multiprocessing.get_context("forkserver"), {}
    for name, tile in (("dicm", 0), ("dicm bf16", 0), ("dicm", 512), ("fast", 0), (BASE, 0)):
        if name in options.codecs:
            with context.Pool(1) as pool:
                figures[name + (" tile" if tile else "")] = pool.apply(peak_of, (name, tile, options))
    table = Table(
        "codec", "MiB", title="memory: peak of encoding {} x {}, above the loaded codec".format(*options.large)
    )
    for name, value in figures.items():
        table.add_row(name, f"{value:.0f}")
    CONSOLE.print(table)
    return figures


def peak_of(name: str, tile: int, options: argparse.Namespace) -> float:
    """Peak MiB of this process, which has done nothing yet, while `name` encodes, above what it had before."""
    (image,) = begin(options, 1)
    codec = create(name, resized(image, 256, 256))
    codec.encode(resized(image, 64, 64))
    large = resized(image, *options.large)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    codec.encode(large, **({"tile": tile} if tile else {}))
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def measure_growth(image: Tensor, name: str, sides: Sequence[int]) -> dict[str, float]:
    """Nanoseconds a pixel of encoding, by side; decoding beside it."""
    codec = our_codec(name, resized(image, 256, 256))
    figures: dict[str, float] = {}
    table = Table("side", "encode ns/pixel", "decode ns/pixel", title="growth")
    for side in sides:
        picture, repeat = resized(image, side, side), max(1, min(9, 3000 // side))
        stream = codec.encode(picture)
        encode = 1e6 * milliseconds(lambda p=picture: codec.encode(p), repeat) / side**2
        decode = 1e6 * milliseconds(lambda s=stream: codec.decode(s), repeat) / side**2
        figures[f"encode_{side}"], figures[f"decode_{side}"] = encode, decode
        table.add_row(str(side), f"{encode:.0f}", f"{decode:.0f}")
    CONSOLE.print(table)
    first, last = sides[0], sides[-1]
    encode, decode = (figures[f"{key}_{last}"] / figures[f"{key}_{first}"] for key in ("encode", "decode"))
    print(f"per pixel, {last} over {first}: encode {encode:.2f}, decode {decode:.2f}")
    return figures


def measure_contexts(image: Tensor, repeat: int) -> dict[str, dict[str, float]]:
    """Times of one image by context model."""
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


def small(folder: Path) -> list[str]:
    """Options of a tiny run."""
    sizes = ["--size", "64", "64", "--large", "64", "128", "--sides", "64", "128"]
    return ["--data", str(smoke.photos(folder, 1)), *sizes, "--codecs", "fast", BASE, "--repeat", "1", "--threads", "1"]


def create_parser() -> argparse.ArgumentParser:
    """Its options."""
    parser = common_parser(__doc__, PARTS)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument(
        "--codecs", nargs="+", choices=(*OURS, *THEIRS), default=[*OURS, *THEIRS], help="all by default"
    )
    parser.add_argument("--size", type=int, nargs=2, default=(512, 768), metavar=("H", "W"), help="multiples of 64")
    parser.add_argument("--large", type=int, nargs=2, default=(1024, 2048), metavar=("H", "W"), help="multiples of 64")
    parser.add_argument("--sides", type=int, nargs="+", default=[256, 512, 1024, 2048])
    return parser


def main() -> None:
    """Measure, print, write the figures."""
    options = smoke.parse(create_parser(), small)
    (image,) = begin(options, 1)
    standard = resized(image, *options.size)
    parts: dict[str, Callable[[], Any]] = {
        "speed": lambda: measure_speed(standard, options.codecs, options.repeat),
        "memory": lambda: measure_memory(options),
        "growth": lambda: measure_growth(image, options.codecs[0], options.sides),
        "contexts": lambda: measure_contexts(standard, options.repeat),
    }
    figures = {part: parts[part]() for part in options.only}
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
