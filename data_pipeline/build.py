"""From a source to shards: every image is decoded once; what cannot be used is left out and listed.

Processes read and check images, this one writes shards in the order of the listing: equal input gives equal bytes,
whatever the number of processes. An interrupted build goes on where it was (`unfinished`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from data_pipeline.errors import DataError
from data_pipeline.in_hand import take
from data_pipeline.manifest import SCHEMA_VERSION, Manifest, Split
from data_pipeline.parallel import ordered_map
from data_pipeline.shards import ShardWriter, refuse_existing
from data_pipeline.sources import Job, Listing, Rejected, Sample, UnusableError
from data_pipeline.sources.layouts import list_source
from data_pipeline.unfinished import PRELOAD, Step, UnfinishedBuild

REJECTED = "rejected.jsonl"
NAMED = 10  # images that an error names
REMEDY = "with fewer --processes"
JOBS_AT_ONCE = 8  # a process holds so many images; street scenes take megabytes each


@dataclass(frozen=True)
class Built:
    """A finished data set: its manifest, what was rejected on the way, and how many shards an earlier build left."""

    manifest: Manifest
    rejected: tuple[Rejected, ...]
    num_kept_shards: int


def build_dataset(
    layout: str,
    source: Path,
    out: Path,
    *,
    splits: Mapping[str, str] | None = None,
    val_fraction: float = 0.0,
    shard_samples: int = 1000,
    shard_mib: int = 256,
    num_processes: int | None = None,
    restart: bool = False,
    on_total: Callable[[int], None] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Built:
    """Build the data set `out` from `source`, a folder in one of `sources.layouts`.

    `out` appears when it is complete, and not at all before. After an interruption the same call goes on behind the
    last finished shard, and gives the bytes of a build that was never interrupted.

    Args:
        splits: names of the splits to make, each with the source's split it is made of; None: the layout's own.
        val_fraction: share of the images of train, every n-th, that becomes the val split where there is none.
        shard_samples, shard_mib: a shard is closed at so many samples or MiB.
        num_processes: for reading images; None is one a core, as far as memory has room.
        restart: discard what an interrupted build left.
        on_total, progress: called with the number of images, and with how many more are done.

    Raises:
        DataError: nothing to build from, contradicting annotations, `out` is there already, or no image is usable.
    """
    for name, value in (("shard-samples", shard_samples), ("shard-mib", shard_mib)):
        if value < 1:
            raise DataError(f"{name}={value} must be at least 1")
    refuse_existing(out)
    listing = list_source(layout, source, splits)
    jobs = _set_val_aside(listing.splits, val_fraction)
    if on_total is not None:
        on_total(sum(map(len, jobs.values())))
    plan = {
        "layout": layout,
        "source": str(source.resolve()),
        "splits": None if splits is None else dict(splits),
        "val-fraction": val_fraction,
        "shard-samples": shard_samples,
        "shard-mib": shard_mib,
        "schema": SCHEMA_VERSION,
        "listing": _digest(listing),
    }
    with UnfinishedBuild(out, plan, restart=restart, num_processes=num_processes) as unfinished:
        num_kept = sum(step.shard is not None for step in unfinished.steps)
        for split, listed in jobs.items():
            with ShardWriter(
                unfinished.dataset,
                split,
                max_samples=shard_samples,
                max_bytes=shard_mib * 2**20,
                finished=[step.shard for step in unfinished.of_split(split) if step.shard is not None],
            ) as writer:
                _write_split(unfinished, writer, listing, listed, num_processes, progress)
        manifest, rejected = _summary(listing, jobs, unfinished.steps)
        if rejected:
            lines = "".join(json.dumps(asdict(item)) + "\n" for item in rejected)
            (unfinished.dataset / REJECTED).write_text(lines)
        manifest.save(unfinished.dataset)
        unfinished.publish()
    return Built(manifest, rejected, num_kept)


def _write_split(
    unfinished: UnfinishedBuild,
    writer: ShardWriter,
    listing: Listing,
    jobs: tuple[Job, ...],
    num_processes: int | None,
    progress: Callable[[int], None] | None,
) -> None:
    """Write the samples of a split behind the finished ones, with a step for each finished shard."""
    done = unfinished.of_split(writer.split)
    start = done[-1].next_job if done else 0
    report = progress or (lambda count: None)
    report(start)
    rejected: list[Rejected] = []

    def record(next_job: int, num_shards: int) -> None:
        shard = writer.shards[-1] if len(writer.shards) > num_shards else None
        unfinished.record(Step(writer.split, next_job, shard, tuple(rejected)))
        rejected.clear()

    results = ordered_map(partial(_read, listing.read), jobs[start:], num_processes, JOBS_AT_ONCE, PRELOAD, REMEDY)
    num_shards = len(writer.shards)
    for number, result in enumerate(results, start):
        if isinstance(result, Rejected):
            rejected.append(result)
        else:
            writer.write(result.fields(f"{writer.split}-{number:08d}"))
            if len(writer.shards) > num_shards:  # this sample is the first of the next shard
                record(number, num_shards)
                num_shards = len(writer.shards)
            rejected += result.remarks
        report(1)
    if start < len(jobs):
        writer.finish()
        record(len(jobs), num_shards)


def _read(read: Callable[[Any], Sample], job: Job) -> Sample | Rejected:
    take(job.name)
    try:
        return read(job)
    except UnusableError as error:
        return Rejected(job.name, "image", str(error))


def _summary(
    listing: Listing, jobs: Mapping[str, tuple[Job, ...]], steps: list[Step]
) -> tuple[Manifest, tuple[Rejected, ...]]:
    """The manifest of all steps, and all that was rejected."""
    rejected = (*listing.rejected, *(item for step in steps for item in step.rejected))
    shards = {split: [step.shard for step in steps if step.split == split and step.shard] for split in jobs}
    splits = {split: Split(tuple(found)) for split, found in shards.items() if found}
    if not splits:
        images = [item for item in rejected if item.what == "image"]
        named = [f"{item.file}: {item.reason}" for item in images[-NAMED:]]
        more = ["..."] if len(images) > NAMED else []
        raise DataError(
            f"{listing.root}: none of its {sum(item.count for item in images)} images can be used "
            f"({'; '.join([*named, *more])}); name a folder of JPEG, PNG or WebP images"
        )
    name = listing.root.resolve().name
    return Manifest(name, listing.classes, splits, semantic_classes=listing.semantic_classes), rejected


def _set_val_aside(splits: Mapping[str, tuple[Job, ...]], val_fraction: float) -> dict[str, tuple[Job, ...]]:
    """Jobs by split, every n-th of train set aside where there is no val."""
    if not 0 <= val_fraction < 1:
        raise DataError(f"val-fraction={val_fraction:g} must be at least 0 and less than 1")
    if val_fraction == 0 or "val" in splits or "train" not in splits:
        return dict(splits)
    parts: tuple[list[Job], list[Job]] = ([], [])
    for number, job in enumerate(splits["train"]):
        parts[int((number + 1) * val_fraction) > int(number * val_fraction)].append(job)
    return {**splits, "train": tuple(parts[0]), "val": tuple(parts[1])}


def _digest(listing: Listing) -> str:
    """sha256 of all that a listing holds, and of the size and time of each of its files."""
    digest = hashlib.sha256(repr((listing.classes, listing.semantic_classes, listing.rejected)).encode())
    for split, jobs in listing.splits.items():
        digest.update(split.encode())
        for job in jobs:
            digest.update(repr(list(_facts(job, listing.root))).encode())
    return digest.hexdigest()


def _facts(job: Job, root: Path) -> Iterator[object]:
    """What a job holds, its paths from the source on, so that it does not matter how the source was named."""
    for name, value in vars(job).items():
        if isinstance(value, Path) and name != "root":
            yield str(value).removeprefix(str(root))
            try:
                status = value.stat()
                yield status.st_size, status.st_mtime_ns
            except OSError:
                yield None
        elif name != "root":
            yield value
