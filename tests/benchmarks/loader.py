"""The loader beside the stock one on the same shards, and what the order of samples costs and is worth.

    python tests/benchmarks/loader.py --data PHOTOS [--size 224] [--canvas 288] [--repeat 5] [--json FILE]

PHOTOS is a folder of images, built into shards for both sides. Stock is `webdataset.WebDataset`, Pillow and lightly's
MoCoV2Transform (two views); ours reads, decodes to canvases and collates; `bare` is libjpeg-turbo and cv2.resize by area
averages of bytes in memory, `bare_linear` the same with a resize that aliases. One thread each, taking turns, the
shortest turn counts.

Figures in --json: `ours`, `stock`, `bare`, `bare_linear` (samples a second), `over_stock`, `of_bare`; `resume_ratio` (first batch at
99 % of an epoch over that at 1 %, 10^6 samples), `order_mib` (peak of the order of 10^9 samples), `distance` and
`entropy` (neighbours' mean distance and the labels' entropy of a batch over those of a full shuffle, by shards).
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import simplejpeg
import smoke
import torch
import webdataset
from lightly.transforms import MoCoV2Transform
from rich.console import Console
from rich.table import Table

from data_pipeline.build import build_dataset
from data_pipeline.loader import CanvasDataset
from data_pipeline.manifest import Manifest
from data_pipeline.order import ElasticSampler, SampleOrder
from data_pipeline.shards import ShardReader

BATCH = 256
CONSOLE = Console(width=100)


def small(folder: Path) -> list[str]:
    """Options of a tiny run."""
    return ["--data", str(smoke.photos(folder)), "--size", "32", "--canvas", "48", "--repeat", "1"]


def create_parser() -> argparse.ArgumentParser:
    """Its options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of images")
    parser.add_argument("--size", type=int, default=224, help="side of a view")
    parser.add_argument("--canvas", type=int, default=288, help="side of a canvas")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", type=Path, help="file for the figures")
    smoke.add_option(parser)
    return parser


def main() -> None:
    arguments = smoke.parse(create_parser(), small)
    torch.set_num_threads(1)
    cv2.setNumThreads(0)

    with tempfile.TemporaryDirectory() as scratch:
        with smoke.light_processes():
            build_dataset("imagefolder", arguments.data, Path(scratch) / "shards", num_processes=1)
        figures = speeds(Path(scratch) / "shards", arguments.size, arguments.canvas, arguments.repeat)
    figures |= order_costs(arguments.repeat)
    figures |= {"shuffle": {shards: shuffle_quality(shards) for shards in (128, 512, 2048)}}

    table = Table("pipeline", "samples/s", title="one core, the same shards")
    for name in ("ours", "bare", "bare_linear", "stock"):
        table.add_row(name, f"{figures[name]:.1f}")
    CONSOLE.print(table)
    shares = [f"{100 * figures[key]:.0f} %" for key in ("of_bare", "of_bare_linear")]
    print(f"ours over stock {figures['over_stock']:.1f}; of bare decode and resize {shares[0]}, aliased {shares[1]}")
    print(f"first batch of 10^6 samples at 99 % over that at 1 % of an epoch: {figures['resume_ratio']:.2f}")
    print(f"order of 10^9 samples: {figures['order_mib']:.0f} MiB at its peak")
    for shards, (distance, entropy) in figures["shuffle"].items():
        print(f"{shards} shards, over a full shuffle: neighbours' distance {distance:.3f}, label entropy {entropy:.3f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


def speeds(root: Path, size: int, canvas: int, repeat: int) -> dict[str, float]:
    """Samples a second of the three pipelines over one split."""
    split = next(iter(Manifest.load(root).splits))
    dataset = CanvasDataset(root, split, canvas)
    urls = [str(path) for path in sorted(root.glob("*.tar"))]
    reader = ShardReader(root, dataset.reader.split)
    jpegs = [data for data in (reader.read(index).get("jpg") for index in range(len(reader))) if data]
    transform = MoCoV2Transform(input_size=size)

    def ours() -> int:
        batch = dataset.__getitems__(list(range(len(dataset)))).batch
        assert batch is not None
        return len(batch.canvas)

    def stock() -> int:
        pipeline = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).decode("pilrgb")
        return sum(len(transform(image)) // 2 for (image,) in pipeline.to_tuple("jpg;png;webp"))

    def bare(interpolation: int = cv2.INTER_AREA) -> int:
        for data in jpegs:
            pixels = simplejpeg.decode_jpeg(data, "RGB", fastdct=False, fastupsample=False, **reduced(data, canvas))
            cv2.resize(pixels, (canvas, canvas), interpolation=interpolation)
        return len(jpegs)

    def bare_linear() -> int:
        return bare(cv2.INTER_LINEAR)

    rates = dict.fromkeys(("ours", "stock", "bare", "bare_linear"), 0.0)
    for _, side in itertools.product(range(repeat), (ours, stock, bare, bare_linear)):
        start = time.thread_time()
        count = side()
        rates[side.__name__] = max(rates[side.__name__], count / (time.thread_time() - start))
    shares = {f"of_{name}": rates["ours"] / rates[name] for name in ("bare", "bare_linear")}
    return {**rates, "over_stock": rates["ours"] / rates["stock"], **shares}


def reduced(data: bytes, canvas: int) -> dict[str, int]:
    """libjpeg-turbo's scale for a canvas, as simplejpeg takes it."""
    height, width = simplejpeg.decode_jpeg_header(data)[:2]
    factor = next((factor for factor in (8, 4, 2) if min(height, width) >= factor * canvas), 1)
    return {"min_height": -(-height // factor), "min_width": -(-width // factor), "min_factor": factor}


def order_costs(repeat: int) -> dict[str, float]:
    """What resuming and remembering cost."""

    def first_batch(position: int) -> float:
        def run() -> None:
            order = SampleOrder([1000] * 1000)
            next(iter(ElasticSampler(order, BATCH, 0, 1, position)))

        return clocked(run)

    tracemalloc.start()
    order = SampleOrder(np.full(10**6, 1000))
    for position in (0, 10**9 - BATCH // 2, 5 * 10**9):
        order.take(position, position + BATCH)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    pairs = [(first_batch(990_000), first_batch(10_000)) for _ in range(20 * repeat)]
    late, early = (statistics.median(times) for times in zip(*pairs, strict=True))
    return {"resume_ratio": late / early, "order_mib": peak / 2**20}


def clocked(function: Callable[[], object]) -> float:
    """Seconds of this thread that `function` takes."""
    start = time.thread_time()
    function()
    return time.thread_time() - start


def shuffle_quality(num_shards: int, size: int = 200, classes: int = 100) -> tuple[float, float]:
    """Over a full shuffle: the mean distance of samples that lie side by side in a shard, and a batch's label entropy.

    Labels are sorted on disk, as those of image folders are.
    """
    order = SampleOrder([size] * num_shards)
    count = order.num_samples
    taken, full = order.take(0, count), np.random.default_rng(0).permutation(count)
    labels = np.arange(count) * classes // count
    distances, entropies = [], []
    for sequence in (taken, full):
        position = np.empty(count, np.int64)
        position[sequence] = np.arange(count)
        distances.append(np.abs(np.diff(position.reshape(num_shards, size), axis=1)).mean())
        batches = labels[sequence][: count // BATCH * BATCH].reshape(-1, BATCH)
        entropies.append(statistics.mean(entropy(np.bincount(batch) / BATCH) for batch in batches))
    return distances[0] / distances[1], entropies[0] / entropies[1]


def entropy(shares: np.ndarray) -> float:
    """Bits."""
    return float(-(shares[shares > 0] * np.log2(shares[shares > 0])).sum())


if __name__ == "__main__":
    main()
