"""The codec beside CompressAI's mbt2018-mean (quality 4) and bmshj2018-hyperprior, on the same images in one run.

    python tests/benchmarks/codec.py --data PHOTOS [--codec CODEC] [--limit 12] [--threads 2] [--only PART ...] [--json FILE]

PHOTOS is searched for images. Parts, each with a table of its own and its figures in --json under its name:

    rate     real bytes against the estimate, and what the guard list costs: all images, and crops of odd sizes
    symbols  symbols that change under other thread counts, memory formats and scales off by up to the guard: none
    variants what tiles and bfloat16 change: bytes, and features, also near the seams of tiles
    speed    512 x 768: encode, share of entropy coding, bytes to the input of layer2; multiply-adds; a profile
    memory   peak of encoding 1024 x 2048, each codec in a process of its own
    growth   encoding time per pixel from 256 x 256 to 2048 x 2048
    contexts 512 x 768, recipe `evidence`: what context models take of time

`rate`, `symbols` and `variants` are of --codec where given. The others but the last are of the authors' widths (recipe
dicm_resnet50) and of recipe `fast`. All have random weights whose latents are scaled to a deviation of one, as are
CompressAI's: times depend on how many symbols there are and hardly on their values. CompressAI's decoder gives pixels,
so stem and layer1 are added to it.
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
from compressai.zoo import bmshj2018_hyperprior, mbt2018_mean
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from torchvision.io import ImageReadMode, decode_image

from data_pipeline.views import normalize
from pretrain.codec import bitstream
from pretrain.codec.config import CONTEXTS, CodecConfig
from pretrain.codec.feature_codec import FeatureCodec
from pretrain.codec.memory import keep_freed_memory
from pretrain.codec.precision import has_bfloat16
from pretrain.run import resolve

PARTS = ("rate", "symbols", "variants", "speed", "memory", "growth", "contexts")
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
SIZES = [(16, 16), (17, 31), (64, 65), (333, 500), (1024, 2048)]
TILE = 256
OURS = ("dicm", "dicm bf16", "fast", "fast bf16")
THEIRS = {"mbt2018-mean": mbt2018_mean, "bmshj2018-hyperprior": bmshj2018_hyperprior}
CONSOLE = Console(width=120)


def our_codec(name: str, image: Tensor, *options: str) -> FeatureCodec:
    """A codec of a recipe's widths, random weights scaled so that y2 and z have a deviation of one."""
    recipe, _, precision = name.partition(" ")
    config: CodecConfig = resolve({"dicm": "dicm_resnet50"}.get(recipe, recipe), ["data=none", *options]).codec
    torch.manual_seed(0)
    codec = FeatureCodec(config).eval().requires_grad_(False)
    codec.precision = precision or "fp32"
    images = normalize(image[None].float() / 255)
    with torch.inference_mode():
        codec.g_a[-1].weight.div_(codec.analyse(images)[0].std())
        codec.h_a[-1].weight.div_(codec.analyse(images)[1].std())
        y2, _ = codec.analyse(images)
        codec.h_s.head.weight.mul_(0.1)
        codec.h_s.head.bias.copy_(torch.cat([y2.mean(dim=(0, 2, 3)), y2.std(dim=(0, 2, 3))]))
    return codec


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


def resized(image: Tensor, height: int, width: int) -> Tensor:
    """(3, height, width) uint8 of any image: its middle where it is large enough, else mirrored outwards."""
    while image.shape[-2] < height or image.shape[-1] < width:
        image = torch.cat([image, image.flip(-1)], dim=-1)
        image = torch.cat([image, image.flip(-2)], dim=-2)
    top, left = (image.shape[-2] - height) // 2, (image.shape[-1] - width) // 2
    return image[:, top : top + height, left : left + width].contiguous()


def measure_rate(codec: FeatureCodec, images: list[Tensor]) -> dict[str, Any]:
    """Bytes against estimate and header, an entry for each image and size; the guard's share of all bytes."""
    entries, guard_bytes, all_bytes = [], 0, 0
    for image in [*images, *(resized(images[0], *size) for size in SIZES)]:
        stream = codec.encode(image)
        with torch.inference_mode():
            estimate = float(codec(normalize(image[None].float() / 255)).bits) / 8
        info, layers = bitstream.unpack(stream, codec.fingerprint)
        bare = [bitstream.Layer(layer.payload, layer.digest) for layer in layers]
        plain = bitstream.pack(codec.fingerprint, info.height, info.width, bare, info.rate)
        guard_bytes, all_bytes = guard_bytes + len(stream) - len(plain), all_bytes + len(stream)
        entries.append(
            {
                "size": list(image.shape[-2:]),
                "bytes": len(stream),
                "header": info.header_bytes,
                "estimate": estimate,
                "gap": len(stream) / (estimate + info.header_bytes) - 1,
            }
        )
    gaps = sorted(abs(entry["gap"]) for entry in entries)
    large = sorted(abs(entry["gap"]) for entry in entries[: len(images)])
    figures = {
        "entries": entries,
        "median_gap": statistics.median(gaps),
        "worst_gap": gaps[-1],
        "worst_gap_photographs": large[-1],
        "guard_share": guard_bytes / all_bytes,
    }
    table = Table("size", "bytes", "header", "estimate", "gap", title="rate: bytes against estimate + header")
    for entry in entries:
        size = "x".join(map(str, entry["size"]))
        numbers = (
            f"{entry['bytes']}",
            f"{entry['header']}",
            f"{entry['estimate']:.1f}",
            f"{100 * entry['gap']:+.2f} %",
        )
        table.add_row(size, *numbers)
    CONSOLE.print(table)
    print(
        f"gap: median {100 * gaps[len(gaps) // 2]:.2f} %, worst {100 * gaps[-1]:.2f} %, of whole photographs "
        f"{100 * large[-1]:.2f} %; guard lists are {100 * figures['guard_share']:.4f} % of all bytes"
    )
    return figures


def measure_symbols(codec: FeatureCodec, images: list[Tensor]) -> dict[str, int]:
    """How many images decode to other symbols under each disturbance; a failed digest counts."""
    streams = [codec.encode(image) for image in images]
    expected = [codec.decode_latents([stream]) for stream in streams]
    threads, forward = torch.get_num_threads(), codec._ready().h_s.forward
    generator = torch.Generator().manual_seed(0)

    def disturbed(z_hat: Tensor) -> tuple[Tensor, Tensor]:
        means, scales = forward(z_hat)
        noise = 2 * torch.rand(scales.shape, generator=generator, dtype=scales.dtype) - 1
        return means, scales * (1 + 0.99 * codec.config.guard * noise)

    def changed() -> int:
        count = 0
        for stream, latents in zip(streams, expected, strict=True):
            try:
                # Another symbol is off by one; means may differ by the last bits of float64.
                count += not torch.allclose(codec.decode_latents([stream]), latents, atol=1e-3)
            except bitstream.BitstreamError:
                count += 1
        return count

    figures = {"images": len(images)}
    for count in (1, 2, 4):
        torch.set_num_threads(count)
        figures[f"{count} threads"] = changed()
    torch.set_num_threads(threads)
    codec._ready().h_s.forward = disturbed  # type: ignore[method-assign]
    figures["scales off by the guard"] = changed()
    codec._ready().h_s.forward = forward  # type: ignore[method-assign]
    codec.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    figures["contiguous"] = changed()
    codec.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    table = Table("disturbance", "images with other symbols", title=f"symbols of {len(images)} images")
    for name, count in list(figures.items())[1:]:
        table.add_row(name, str(count))
    CONSOLE.print(table)
    return figures


def measure_variants(codec: FeatureCodec, images: list[Tensor]) -> dict[str, dict[str, float]]:
    """What tiles, their seams and bfloat16 change: bytes, and mean squared errors of f3 over its variance.

    `all` over the whole feature, `seams` where it lies within 8 pixels of a seam between tiles of 256.
    """
    kinds = {"tiles": {"tile": TILE}, "bf16": {}, "bf16, tiles": {"tile": TILE}}
    figures = {kind: {"bytes": 0.0, "all": 0.0, "seams": 0.0} for kind in kinds}
    for image in images:
        stream = codec.encode(image)
        f3 = codec.decode(stream)
        near = torch.zeros(f3.shape[-2:], dtype=torch.bool)
        for side, length in ((0, image.shape[-2]), (1, image.shape[-1])):
            for seam in range(TILE, length, TILE):
                near.index_fill_(side, torch.arange((seam - 8) // 4, min((seam + 8) // 4, near.shape[side])), True)
        for kind, options in kinds.items():
            codec.precision = "bf16" if kind.startswith("bf16") else "fp32"
            other = codec.encode(image, **options)
            error = (codec.decode(other, **options) - f3).square().mean(dim=(0, 1)) / f3.var()
            codec.precision = "fp32"
            row = {
                "bytes": len(other) / len(stream) - 1,
                "all": float(error.mean()),
                "seams": float(error[near].mean()),
            }
            for key, value in row.items():
                figures[kind][key] += value / len(images)
    table = Table("variant", "bytes", "error of f3", "near seams", title="against the whole picture in float32, means")
    for kind, row in figures.items():
        table.add_row(kind, f"{100 * row['bytes']:+.3f} %", f"{row['all']:.1e}", f"{row['seams']:.1e}")
    CONSOLE.print(table)
    return figures


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of images, searched through")
    parser.add_argument("--codec", help="exported codec, for rate and symbols; without it the authors' widths")
    parser.add_argument("--limit", type=int, default=12, help="number of images")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    parser.add_argument("--tile", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # both sides; as `dicm encode` does
    if not has_bfloat16(torch.device("cpu")):
        print("this processor has no bfloat16: rows called bf16 are float32")

    files = sorted(path for path in options.data.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not files:
        parser.error(f"--data {options.data}: no images")
    if options.peak_of:
        print(peak_of(options.peak_of, decode_image(str(files[0]), mode=ImageReadMode.RGB), options.tile))
        return
    images = [decode_image(str(path), mode=ImageReadMode.RGB) for path in files[: options.limit]]
    standard = resized(images[0], 512, 768)
    figures: dict[str, Any] = {}
    if {"rate", "symbols", "variants"} & set(options.only):
        codec = FeatureCodec.from_pretrained(options.codec) if options.codec else our_codec("dicm", standard)
        if "rate" in options.only:
            figures["rate"] = measure_rate(codec, images)
        if "symbols" in options.only:
            figures["symbols"] = measure_symbols(codec, images)
        if "variants" in options.only:
            figures["variants"] = measure_variants(codec, images)
    if "speed" in options.only:
        figures["speed"] = measure_speed(standard, options.repeat)
    if "memory" in options.only:
        figures["memory"] = measure_memory(options.data)
    if "growth" in options.only:
        figures["growth"] = measure_growth(images[0])
    if "contexts" in options.only:
        figures["contexts"] = measure_contexts(standard, options.repeat)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
