"""Payloads of few symbols: the range coder beside compressai's rANS, in bytes of real streams and in time.

    python tests/benchmarks/symbols.py CODEC FOLDER [--every 1] [--json FILE]

Encodes the pictures of FOLDER and of folders in it with both; then codes 1,664 symbols (z and y2 of 64 px, recipe
`small`) of narrow tables, medians of 15 rounds. Figures in --json: `bytes` and `milliseconds` (write, read), by coder.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import smoke
import torch

from data_pipeline.decoding import decode_image
from data_pipeline.folders import IMAGE_SUFFIXES
from pretrain.codec import symbols
from pretrain.codec.entropy import CoderTables, LatentEntropy, scale_indexes, solve_quantiles
from pretrain.codec.feature_codec import FeatureCodec

CODERS = {"range coder": symbols.SHORT_SYMBOLS, "rANS": 0}  # symbols up to which the range coder is used
NUM_SYMBOLS, ROUNDS = 1664, 15


def small(folder: Path) -> list[str]:
    """Options of a tiny run."""
    return [str(smoke.codec(folder)), str(smoke.photos(folder))]


def create_parser() -> argparse.ArgumentParser:
    """Its options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("codec", type=Path)
    parser.add_argument("pictures", type=Path)
    parser.add_argument("--every", type=int, default=1, help="take one picture in so many")
    parser.add_argument("--json", type=Path, help="file for the figures")
    smoke.add_option(parser)
    return parser


def main() -> None:
    arguments = smoke.parse(create_parser(), small)
    codec = FeatureCodec.from_pretrained(arguments.codec)
    files = sorted(path for path in arguments.pictures.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    images = [torch.from_numpy(decode_image(path.read_bytes())).permute(2, 0, 1) for path in files[:: arguments.every]]
    figures: dict[str, dict[str, object]] = {"bytes": {}, "milliseconds": {}}
    for name, most in CODERS.items():
        symbols.SHORT_SYMBOLS = most
        sizes = [sum(codec.describe(codec.encode(image)).layers.values()) for image in images]
        figures["bytes"][name] = statistics.fmean(sizes)
        figures["milliseconds"][name] = write_and_read()
        write, read = figures["milliseconds"][name]  # type: ignore[misc]
        print(f"{name:<12} {statistics.fmean(sizes):8.1f} bytes of {len(images)} pictures, "
              f"{NUM_SYMBOLS} symbols: {write:.2f} ms to write, {read:.2f} to read")  # fmt: skip
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


def write_and_read() -> tuple[float, float]:
    torch.manual_seed(0)
    entropy = LatentEntropy(1)
    solve_quantiles(entropy.z)
    table = CoderTables.build(entropy).y2
    scales = torch.rand(NUM_SYMBOLS) * 0.6 + 0.1
    values, indexes = (torch.randn(NUM_SYMBOLS) * scales).round().int(), scale_indexes(scales.double())[0]
    seconds: list[tuple[float, float]] = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        payload = symbols.encode_symbols([(table, values, indexes)])
        middle = time.perf_counter()
        symbols.SymbolDecoder(payload, NUM_SYMBOLS).read(table, indexes)
        seconds.append((middle - start, time.perf_counter() - middle))
    write, read = (1e3 * statistics.median(each) for each in zip(*seconds, strict=True))
    return write, read


if __name__ == "__main__":
    main()
