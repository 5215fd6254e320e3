"""The cache of remote shards: damage found, bytes read by a rank, memory while shards come and go.

    python tests/benchmarks/cache.py [--damaged 400] [--shards 256] [--shard-samples 1000] [--epochs 10] [--json FILE]

Shards of random bytes, or of small JPEGs for the memory, are served over HTTP by a process of this machine and read
through caches in a temporary folder. Figures in --json:

- `damaged`, `found`: shards with a cut (every other one) or a flipped bit at a random place, and how many of them
  were refused before a byte was used, first at the store, then in the cache of a process that had not fetched them.
- `share_equal`, `share_short`, `share_uneven`: the largest, over the 8 ranks of a world of 8, of the bytes that a rank
  fetched in an epoch, times 8, over those of all shards (1.0: each rank fetches an eighth). The shards are equal, so that lanes and pools of shards end
  at the same places; equal but for a short last one, as `dicm data build` writes them, so that they do not; and of many
  sizes. The figure grows with the samples in a shard, up to those that shards have by default.
- `resident_mib`: memory of the process after each epoch, with a cache that holds a quarter of the shards;
  `growth_mib`: the last less that after the second, when all buffers exist; `evicted`: shards removed on the way.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import smoke
from PIL import Image

from data_pipeline.cache import ShardCache
from data_pipeline.errors import DataError
from data_pipeline.loader import train_loader
from data_pipeline.manifest import Manifest, Shard, Split
from data_pipeline.order import ElasticSampler, SampleOrder
from data_pipeline.shards import ShardReader, ShardWriter
from data_pipeline.storage import Retries

WORLD, BATCH = 8, 256
RETRIES = Retries(attempts=2, backoff=0.01, timeout=30.0)


def write_shards(root: Path, sizes: Sequence[int], images: list[bytes]) -> Manifest:
    """A data set of shards with so many samples each."""
    root.mkdir(parents=True)
    shards: list[Shard] = []
    for number, size in enumerate(sizes):
        with ShardWriter(root, f"part{number:03d}") as writer:
            for sample in range(size):
                image = images[random.randrange(len(images))]
                writer.write({"__key__": f"{number:03d}-{sample:04d}", "jpg": image})
        shards += writer.shards
    manifest = Manifest("benchmark", (), {"train": Split(tuple(shards))})
    manifest.save(root)
    return manifest


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of `folder`, served by a process of its own."""
    command = [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1", "--directory", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        port = process.stdout.readline().split(" port ")[1].split()[0]
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def damage(path: Path, cut: bool) -> None:
    """Cut the file, or flip one bit, at a random place."""
    content = bytearray(path.read_bytes())
    place = random.randrange(len(content))
    if cut:
        del content[place:]
    else:
        content[place] ^= 1 << random.randrange(8)
    path.write_bytes(content)


def found_damage(folder: Path, num_shards: int) -> int:
    """How many of the damaged shards no reader used, at the store and, made whole there, in the cache."""
    split = write_shards(folder / "set", [2] * num_shards, [random.randbytes(2000)]).split("train")
    whole = {shard.name: (folder / "set" / shard.name).read_bytes() for shard in split.shards}
    refused = set()
    with served(folder / "set") as url:
        for number, shard in enumerate(split.shards):
            damage(folder / "set" / shard.name, number % 2 == 0)
        reader = ShardReader(url, split, ShardCache(folder / "cache", retries=RETRIES))
        for number in range(num_shards):
            try:
                reader.read(2 * number)
            except DataError:
                refused.add(number)
        assert reader.read_bytes == 0
        for name, content in whole.items():
            (folder / "set" / name).write_bytes(content)
        first = ShardCache(folder / "cache", retries=RETRIES)
        for number, shard in enumerate(split.shards):
            first.fetch(url, shard)
            damage(first.folder / f"{shard.sha256}.tar", number % 2 == 0)
        second = ShardCache(folder / "cache", retries=RETRIES)
        for number, shard in enumerate(split.shards):
            second.open(url, shard).close()
            # Found: the damaged copy was given up, and what was fetched in its place is whole.
            if (second.folder / f"{shard.sha256}.tar").read_bytes() != whole[shard.name]:
                refused.discard(number)
        assert second.fetched_shards == num_shards
    return len(refused)


def largest_share(folder: Path, sizes: Sequence[int]) -> float:
    """Bytes that a rank fetches in an epoch, over an equal part of them; the worst of the ranks."""
    split = write_shards(folder / "set", sizes, [b"image"]).split("train")
    order, total = SampleOrder(split.shard_sizes), sum(shard.bytes for shard in split.shards)
    shares = []
    with served(folder / "set") as url:
        for rank in range(WORLD):
            cache = ShardCache(folder / f"cache{rank}", retries=RETRIES)
            reader, batches = ShardReader(url, split, cache), iter(ElasticSampler(order, BATCH, rank, WORLD))
            for _ in range(order.num_samples // BATCH):
                for number in reader.shards_of(next(batches)):
                    cache.fetch(url, split.shards[number])
            shares.append(cache.fetched_bytes / total * WORLD)
            shutil.rmtree(cache.root)
    shutil.rmtree(folder)
    return max(shares)


def memory(folder: Path, epochs: int) -> tuple[list[float], int]:
    """MiB of this process after each epoch, and the number of shards removed from the cache."""
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    split = write_shards(folder / "set", [32] * 64, [file.getvalue()]).split("train")
    size = split.shards[0].bytes
    resident = []
    with served(folder / "set") as url:
        cache = ShardCache(folder / "cache", 16 * size, RETRIES)
        options = {"canvas_size": 64, "batch_size": 64, "shuffle_shards": 4, "num_lanes": 8}
        loader = train_loader(url, cache=cache, **options)  # type: ignore[arg-type]
        for number, _ in enumerate(loader, start=1):
            if number % (split.num_samples // 64) == 0:
                resident.append(psutil.Process().memory_info().rss / 2**20)
                if len(resident) == epochs:
                    break
        kept = len(list(cache.folder.glob("*.tar")))
    return resident, loader.fetched_bytes // size - kept


def small(folder: Path) -> list[str]:
    """Options of a tiny run."""
    return ["--damaged", "6", "--shards", "16", "--shard-samples", "32", "--epochs", "1"]


def create_parser() -> argparse.ArgumentParser:
    """Its options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--damaged", type=int, default=400)
    parser.add_argument("--shards", type=int, default=256)
    parser.add_argument("--shard-samples", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--json", type=Path)
    smoke.add_option(parser)
    return parser


def main() -> None:
    """Measure, print, write."""
    options = smoke.parse(create_parser(), small)
    random.seed(0)
    with tempfile.TemporaryDirectory() as name:
        found = found_damage(Path(name) / "damage", options.damaged)
        print(f"damaged shards: {options.damaged}, found before use: {found}")
        print(f"bytes a rank fetches in an epoch, over an equal part of all, {WORLD} ranks, {options.shards} shards:")
        size = options.shard_samples
        kinds = {
            "equal": [size] * options.shards,
            "short": [size] * (options.shards - 1) + [size // 5],
            "uneven": [random.randrange(size // 2, size * 3 // 2) for _ in range(options.shards)],
        }
        shares = {f"share_{kind}": largest_share(Path(name) / kind, sizes) for kind, sizes in kinds.items()}
        print("  all equal {:.2f}, the last one short {:.2f}, of many sizes {:.2f}".format(*shares.values()))
        resident, evicted = memory(Path(name) / "memory", options.epochs)
        print("resident MiB after each epoch:", " ".join(f"{value:.1f}" for value in resident), f"({evicted} evicted)")
    growth = resident[-1] - resident[min(1, len(resident) - 1)]
    if options.json:
        figures = {
            "damaged": options.damaged, "found": found, **shares, "resident_mib": resident, "growth_mib": growth, "evicted": evicted,
        }  # fmt: skip
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
