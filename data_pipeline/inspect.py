"""What is in a data set: counts, sizes and classes, from the samples themselves."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np

from data_pipeline.addresses import join
from data_pipeline.decoding import decode_indexes
from data_pipeline.errors import DataError, SampleError
from data_pipeline.manifest import Manifest, Shard, Split
from data_pipeline.parallel import ordered_map
from data_pipeline.shards import ShardReader, facts_of

SIDES = (32, 64, 128, 256, 384, 512, 640, 768, 1024, 1536, 2048, 4096)  # pixels, upper ends of the size histogram
IGNORE = 255


@dataclass
class SplitFacts:
    """Counts of one split; those of its shards add up."""

    samples: int = 0
    bytes: int = 0
    shards: int = 0
    widths: Counter[int] = field(default_factory=Counter)  # images of each width in pixels
    heights: Counter[int] = field(default_factory=Counter)
    sides: Counter[int] = field(default_factory=Counter)  # images by their longer side: index into SIDES, or its length
    labels: Counter[int] = field(default_factory=Counter)  # images of each class, by their label
    box_images: Counter[int] = field(default_factory=Counter)  # images with a box of each class
    box_labels: Counter[int] = field(default_factory=Counter)  # boxes of each class
    semantic_images: Counter[int] = field(default_factory=Counter)  # images with pixels of each mask value
    semantic_pixels: Counter[int] = field(default_factory=Counter)
    masks: int = 0  # instance masks
    semantic: int = 0  # images with a semantic mask

    @property
    def boxes(self) -> int:
        """Boxes of all classes."""
        return self.box_labels.total()

    @property
    def class_images(self) -> Counter[int]:
        """Images of each class: by label, or where images have none, by box."""
        return self.labels or self.box_images

    def add(self, other: SplitFacts) -> None:
        """Count `other` in."""
        for item in fields(self):
            if isinstance(ours := getattr(self, item.name), Counter):
                ours.update(getattr(other, item.name))
            else:
                setattr(self, item.name, ours + getattr(other, item.name))


def split_facts(
    root: str | Path,
    manifest: Manifest,
    name: str,
    progress: Callable[[int], None] | None = None,
    num_processes: int | None = None,
) -> SplitFacts:
    """Read through a split and count; `progress` is called after each shard with its number of samples.

    Raises:
        DataError: no such split, or a shard is missing or damaged.
    """
    facts = SplitFacts()
    jobs = [(root, shard) for shard in manifest.split(name).shards]
    for part in ordered_map(shard_facts, jobs, num_processes, chunk=1, preload=[__name__]):
        facts.add(part)
        if progress is not None:
            progress(part.samples)
    return facts


def shard_facts(job: tuple[str | Path, Shard]) -> SplitFacts:
    """Counts of one shard."""
    root, shard = job
    reader = ShardReader(root, Split((shard,)))
    facts = SplitFacts(samples=shard.samples, bytes=shard.bytes, shards=1)
    for index in range(shard.samples):
        sample = reader.read(index)
        try:
            notes = facts_of(sample)
        except DataError as error:
            raise DataError(f"{join(root, shard.name)}, sample {sample['__key__']}: {error}") from error
        width, height = notes.get("width", 0), notes.get("height", 0)
        facts.widths[width] += 1
        facts.heights[height] += 1
        facts.sides[bisect_left(SIDES, max(width, height))] += 1
        if notes.get("label") is not None:
            facts.labels[notes["label"]] += 1
        facts.box_labels.update(notes.get("labels", []))
        facts.box_images.update(set(notes.get("labels", [])))
        facts.masks += len(notes.get("masks", []))
        if "mask.png" in sample:
            facts.semantic += 1
            try:
                pixels = np.bincount(decode_indexes(sample["mask.png"]).ravel())
            except SampleError as error:
                raise DataError(
                    f"{join(root, shard.name)}, sample {index} ({sample['__key__']}): {error}; build it again"
                ) from error
            present = {int(value): int(pixels[value]) for value in np.flatnonzero(pixels)}
            facts.semantic_pixels.update(present)
            facts.semantic_images.update(present.keys())
    return facts
