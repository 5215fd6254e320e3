"""Time and size of real streams: bytes beside the estimated rate, encoding and decoding, throughput.

    python tests/benchmarks/codec.py --data PHOTOS [--codec CODEC] [--limit 24] [--threads 2] [--json FILE]

PHOTOS is searched for images. Without --codec, the network of recipe `small` with random weights is used,
scaled so that its latents fill many symbols: its times are those of a trained codec, its rates are not.

Figures in --json: `images` (size, bytes, estimate_bytes, encode_ms, decode_ms of each image), `ratio` (bytes
over estimate, all images), `overhead_bytes` (mean of bytes beyond the estimate), `hyper_float64_ms` and
`hyper_float32_ms` (h_s at 64 x 64 and 512 x 768, best of 5), and `batch` (images/s of encode_batch,
decode_batch and both at 64 x 64).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.io import ImageReadMode, decode_image

from data_pipeline.views import normalize
from pretrain.codec.config import CodecConfig
from pretrain.codec.feature_codec import FeatureCodec

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
SMALL = CodecConfig(
    backbone="resnet18", re_channels=48, re_latent=64, transform_channels=64, latent_channels=96,
    hyper_dim=96, hyper_heads=3, hyper_head_dim=32, z_channels=64,
)  # fmt: skip


def random_codec(images: Tensor) -> FeatureCodec:
    """The small network with random weights, latents scaled to a deviation of one, Gaussians to fit."""
    torch.manual_seed(0)
    codec = FeatureCodec(SMALL).eval()
    with torch.no_grad():
        for layer, part in ((codec.g_a[-1], 0), (codec.h_a[-1], 1)):
            layer.weight.mul_(1 / codec._analyse(images)[part].std())
        y2, _ = codec._analyse(images)
        codec.h_s.head.weight.mul_(0.1)
        codec.h_s.head.bias.copy_(torch.cat([y2.mean(dim=(0, 2, 3)), y2.std(dim=(0, 2, 3))]))
    return codec.requires_grad_(False)


def seconds(function: Callable[[], Any], repeat: int) -> float:
    """Shortest of `repeat` runs."""
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def squares(images: list[Tensor], count: int) -> Tensor:
    """`count` images of 64 x 64, uint8, from the middle of `images`."""
    small = []
    for image in images:
        side = min(image.shape[-2:])
        top, left = (image.shape[-2] - side) // 2, (image.shape[-1] - side) // 2
        middle = image[None, :, top : top + side, left : left + side].float()
        small.append(interpolate(middle, size=(64, 64), mode="bilinear", antialias=True).round().byte())
    return torch.cat(small * (count // len(small) + 1))[:count]


def measure_image(codec: FeatureCodec, image: Tensor) -> dict[str, Any]:
    """Bytes, estimate and times of one image."""
    stream = codec.encode(image)
    with torch.inference_mode():
        estimate = float(codec(normalize(image[None].float() / 255)).bits) / 8
    return {
        "size": list(image.shape[-2:]),
        "bytes": len(stream),
        "estimate_bytes": estimate,
        "encode_ms": 1e3 * seconds(lambda: codec.encode(image), 3),
        "decode_ms": 1e3 * seconds(lambda: codec.decode(stream), 3),
    }


def measure_hyper(codec: FeatureCodec) -> dict[str, dict[str, float]]:
    """h_s with scale indexes in float64, as the coder runs it, beside float32; milliseconds an image."""
    coder, figures = codec._ready(), {"hyper_float64_ms": {}, "hyper_float32_ms": {}}
    with torch.inference_mode():
        for name, height, width in (("64x64", 1, 1), ("512x768", 8, 12)):
            z = torch.zeros(1, codec.config.z_channels, height, width, dtype=torch.int32)
            figures["hyper_float64_ms"][name] = 1e3 * seconds(lambda z=z: coder.predict(z), 5)
            figures["hyper_float32_ms"][name] = 1e3 * seconds(lambda z=z: codec.h_s(z.float()), 5)
    return figures


def measure_batch(codec: FeatureCodec, images: Tensor) -> dict[str, float]:
    """Images a second at 64 x 64."""
    streams = codec.encode_batch(images)
    encode = seconds(lambda: codec.encode_batch(images), 3)
    decode = seconds(lambda: codec.decode_batch(streams), 3)
    return {
        "encode_per_second": len(images) / encode,
        "decode_per_second": len(images) / decode,
        "both_per_second": len(images) / (encode + decode),
        "mean_bytes": sum(map(len, streams)) / len(streams),
    }


def main() -> None:
    """Measure, print a table, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of images, searched through")
    parser.add_argument("--codec", help="exported codec; without it, a small one with random weights")
    parser.add_argument("--limit", type=int, default=24, help="number of images")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    files = sorted(path for path in options.data.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not files:
        parser.error(f"--data {options.data}: no images")
    images = [decode_image(str(path), mode=ImageReadMode.RGB) for path in files[: options.limit]]
    small = squares(images, 128)
    codec = (
        FeatureCodec.from_pretrained(options.codec)
        if options.codec
        else random_codec(normalize(small[:32].float() / 255))
    )

    rows = [measure_image(codec, image) for image in images]
    total, estimate = (sum(row[key] for row in rows) for key in ("bytes", "estimate_bytes"))
    figures = {
        "images": rows,
        "ratio": total / estimate,
        "overhead_bytes": (total - estimate) / len(rows),
        **measure_hyper(codec),
        "batch": measure_batch(codec, small),
    }

    print(f"{'size':>11} {'bytes':>8} {'estimate':>9} {'ratio':>6} {'encode ms':>10} {'decode ms':>10}")
    for row in rows:
        size, ratio = "x".join(map(str, row["size"])), row["bytes"] / row["estimate_bytes"]
        print(
            f"{size:>11} {row['bytes']:8d} {row['estimate_bytes']:9.0f} {ratio:6.3f} "
            f"{row['encode_ms']:10.1f} {row['decode_ms']:10.1f}"
        )
    print(f"bytes over estimate {figures['ratio']:.4f}, {figures['overhead_bytes']:+.1f} bytes an image")
    for name, double in figures["hyper_float64_ms"].items():
        print(f"h_s at {name}: float64 {double:.1f} ms, float32 {figures['hyper_float32_ms'][name]:.1f} ms")
    batch = figures["batch"]
    print(
        f"64x64 in batches of {len(small)}: encode {batch['encode_per_second']:.0f}, decode "
        f"{batch['decode_per_second']:.0f}, both {batch['both_per_second']:.0f} images/s "
        f"({options.threads} threads, {batch['mean_bytes']:.0f} bytes an image)"
    )
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
