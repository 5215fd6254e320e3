"""A data set of random bytes: shards of equal size, read over a network in tests of stores and of the cache."""

from __future__ import annotations

import random
from pathlib import Path

from http_store import HttpStore

from data_pipeline.cache import ShardCache
from data_pipeline.manifest import Manifest, Split
from data_pipeline.shards import ShardReader, ShardWriter
from data_pipeline.storage import Retries

SHARDS, SAMPLES = 8, 3
QUICK = Retries(attempts=6, backoff=0.01, timeout=5.0)


def write_noise(root: Path, shards: int = SHARDS, samples: int = SAMPLES, num_bytes: int = 4000) -> Manifest:
    """Shards of equal size; each image is its own random bytes."""
    root.mkdir()
    with ShardWriter(root, "train", max_samples=samples) as writer:
        for number in range(shards * samples):
            image = random.Random(number).randbytes(num_bytes)
            writer.write({"__key__": f"s{number:04d}", "jpg": image, "json": {"label": 0}})
    manifest = Manifest("noise", ("a",), {"train": Split(tuple(writer.shards))})
    manifest.save(root)
    return manifest


def is_sample(fields: dict, number: int) -> bool:
    return fields["__key__"] == f"s{number:04d}" and fields["jpg"] == random.Random(number).randbytes(4000)


def reader_of(store: HttpStore, cache: ShardCache) -> ShardReader:
    return ShardReader(store.url, Manifest.load(store.url).split("train"), cache)


def files(cache: ShardCache, suffix: str = ".tar") -> list[str]:
    return sorted(path.stem for path in cache.folder.iterdir() if path.suffix == suffix)


def reads_all(reader: ShardReader) -> bool:
    return all(is_sample(reader.read(number), number) for number in range(SHARDS * SAMPLES))
