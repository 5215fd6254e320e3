"""What the codec's streams are: their bytes beside the estimate, symbols under disturbances, tiles and bfloat16.

    python tests/benchmarks/codec.py --data PHOTOS [--codec CODEC] [--limit 12] [--threads 2] [--only PART ...] [--json FILE]

PHOTOS is searched for images. Parts, each with a table of its own and its figures in --json under its name:

    rate     real bytes against the estimate, and what the guard list costs: all images, and crops of odd sizes
    symbols  symbols that change under other thread counts, memory formats and scales off by up to the guard: none
    variants what tiles and bfloat16 change: bytes, and features, also near the seams of tiles

They are of --codec where given, else of the authors' widths (recipe dicm_resnet50) with random weights. What the codec
takes of time and memory is codec_costs.py's.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import smoke
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image

from data_pipeline.folders import IMAGE_SUFFIXES
from data_pipeline.views import normalize
from pretrain.codec import bitstream
from pretrain.codec.config import CodecConfig
from pretrain.codec.feature_codec import FeatureCodec
from pretrain.codec.hyperprior import HyperSynthesis
from pretrain.codec.memory import keep_freed_memory
from pretrain.codec.precision import has_bfloat16
from pretrain.run import resolve

SIZES = [(16, 16), (17, 31), (64, 65), (333, 500), (1024, 2048)]
TILE = 256
CONSOLE = Console(width=120)


def common_parser(description: str | None, parts: Iterable[str]) -> argparse.ArgumentParser:
    """Options that both scripts have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of images, searched through")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    smoke.add_option(parser)
    return parser


def begin(options: argparse.Namespace, limit: int) -> list[Tensor]:
    """Prepare this process; the first `limit` images (3, H, W) uint8 of --data."""
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # both sides; as `dicm encode` does
    if not has_bfloat16(torch.device("cpu")):
        print("this processor has no bfloat16: rows called bf16 are float32")
    files = sorted(path for path in options.data.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise SystemExit(f"error: --data {options.data}: no images")
    return [decode_image(str(path), mode=ImageReadMode.RGB) for path in files[:limit]]


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


def resized(image: Tensor, height: int, width: int) -> Tensor:
    """(3, height, width) uint8 of any image: its middle where it is large enough, else mirrored outwards."""
    while image.shape[-2] < height or image.shape[-1] < width:
        image = torch.cat([image, image.flip(-1)], dim=-1)
        image = torch.cat([image, image.flip(-2)], dim=-2)
    top, left = (image.shape[-2] - height) // 2, (image.shape[-1] - width) // 2
    return image[:, top : top + height, left : left + width].contiguous()


def measure_rate(codec: FeatureCodec, images: list[Tensor], most_pixels: int) -> dict[str, Any]:
    """Bytes against estimate and header, an entry for each image and size; the guard's share of all bytes."""
    entries, guard_bytes, all_bytes = [], 0, 0
    crops = [resized(images[0], *size) for size in SIZES if size[0] * size[1] <= most_pixels]
    for image in [*images, *crops]:
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
    threads, forward = torch.get_num_threads(), type(codec.h_s).forward
    generator = torch.Generator().manual_seed(0)

    def disturbed(h_s: HyperSynthesis, z_hat: Tensor) -> tuple[Tensor, Tensor]:
        means, scales = forward(h_s, z_hat)
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
    with patch.object(type(codec.h_s), "forward", disturbed):  # the coder has a copy of its own
        figures["scales off by the guard"] = changed()
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


PARTS = ("rate", "symbols", "variants")


def small(folder: Path) -> list[str]:
    """Options of a tiny run."""
    pictures = smoke.photos(folder, width=TILE + 32)
    return ["--data", str(pictures), "--codec", str(smoke.codec(folder)), "--most-pixels", "5000", "--threads", "1"]


def create_parser() -> argparse.ArgumentParser:
    """Its options."""
    parser = common_parser(__doc__, PARTS)
    parser.add_argument("--codec", help="exported codec; without it the authors' widths")
    parser.add_argument("--limit", type=int, default=12, help="number of images")
    parser.add_argument("--most-pixels", type=int, default=1 << 22, help="of the crops of part rate")
    return parser


def main() -> None:
    """Measure, print, write the figures."""
    options = smoke.parse(create_parser(), small)
    images = begin(options, options.limit)
    codec = (
        FeatureCodec.from_pretrained(options.codec)
        if options.codec
        else our_codec("dicm", resized(images[0], 512, 768))
    )
    parts: dict[str, Callable[[], Any]] = {
        "rate": lambda: measure_rate(codec, images, options.most_pixels),
        "symbols": lambda: measure_symbols(codec, images),
        "variants": lambda: measure_variants(codec, images),
    }
    figures = {part: parts[part]() for part in options.only}
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
