"""A check of a whole data set: every shard, every sample, every label."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cluster import machine
from data_pipeline.addresses import is_remote, join, local_folder
from data_pipeline.cache import ShardCache
from data_pipeline.decoding import decode_image, decode_indexes
from data_pipeline.errors import DataError
from data_pipeline.manifest import Manifest, Shard, Split
from data_pipeline.parallel import ordered_map
from data_pipeline.shards import IMAGE_EXTENSIONS, ShardReader, facts_of
from data_pipeline.sources.annotations import OutlineError, check_mask

IGNORE = 255
PER_BOX = ("labels", "masks", "difficult", "iscrowd", "areas")  # one entry for each box, where they are given


def faults(
    root: str | Path, num_processes: int | None = None, progress: Callable[[int], None] | None = None
) -> Iterator[str]:
    """What is wrong with the data set `root`, a line each; nothing where it is sound.

    Checks that shards are those of the manifest (size, sha256), that each indexed sample is there and alone, that
    its image decodes to the size noted, that labels, boxes and semantic values lie in range, and that masks are of the
    image's size and one for each box.

    Shards of a URL are fetched anew, whatever the cache holds: it is the store that is looked at.

    Args:
        progress: called after each shard with its number of samples.

    Raises:
        DataError: there is no manifest that can be read.
    """
    manifest = Manifest.load(root)
    counts = len(manifest.classes), len(manifest.mask_names)
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    num_processes = num_processes or machine.num_processes()
    with tempfile.TemporaryDirectory(prefix="dicm-verify-") as folder:
        room = 2 * num_processes * max((shard.bytes for shard in shards), default=1)
        jobs = [(root, shard, *counts, ShardCache(folder, room)) for shard in shards]
        results = ordered_map(shard_faults, jobs, num_processes, chunk=1, preload=[__name__])
        for shard, found in zip(shards, results, strict=True):
            yield from found
            if progress is not None:
                progress(shard.samples)
    if not is_remote(root):
        listed = {shard.name for shard in shards}
        for path in sorted(local_folder(root).glob("*.tar")):
            if path.name not in listed:
                yield f"{path}: is not in the manifest; remove it"


def shard_faults(job: tuple[str | Path, Shard, int, int, ShardCache]) -> list[str]:
    """Faults of one shard; its samples are looked at only if its bytes are those of the manifest."""
    root, shard, num_classes, num_semantic, cache = job
    reader = ShardReader(root, Split((shard,)), cache)
    found: list[str] = []
    for index in range(shard.samples):
        try:
            sample = reader.read(index)
        except DataError as error:
            return [*found, str(error)]
        where = f"{join(root, shard.name)}, sample {index} ({sample.get('__key__')})"
        found += (f"{where}: {fault}" for fault in sample_faults(sample, num_classes, num_semantic))
    return found


def sample_faults(sample: dict[str, Any], num_classes: int, num_semantic: int) -> Iterator[str]:
    """Faults of one sample, as read from its shard.

    Args:
        num_classes: labels are less than this.
        num_semantic: values of the semantic mask are less than this, or 255.
    """
    data = next((sample[extension] for extension in IMAGE_EXTENSIONS if extension in sample), None)
    if data is None:
        yield "has no image"
        return
    try:
        height, width = decode_image(data).shape[:2]
        facts = facts_of(sample)
        if (facts.get("width", width), facts.get("height", height)) != (width, height):
            yield f"is {width} x {height}, not {facts.get('width')} x {facts.get('height')} as noted"
        yield from _object_faults(facts, width, height, num_classes)
        if "mask.png" in sample:
            yield from _semantic_faults(sample["mask.png"], width, height, num_semantic)
    except (ValueError, TypeError, AttributeError) as error:
        yield str(error)


def _object_faults(facts: dict[str, Any], width: int, height: int, num_classes: int) -> Iterator[str]:
    labels, boxes = facts.get("labels", []), facts.get("boxes", [])
    for label in [*labels, *([] if facts.get("label") is None else [facts["label"]])]:
        if not 0 <= label < num_classes:
            yield f"label {label} of {num_classes} classes"
    for name in PER_BOX:
        if (name in facts or name == "labels") and len(facts.get(name, [])) != len(boxes):
            yield f"{len(boxes)} boxes with {len(facts.get(name, []))} {name}"
    for left, top, right, bottom in boxes:
        if not (0 <= left < right <= width and 0 <= top < bottom <= height):
            yield f"box {[left, top, right, bottom]} in an image of {width} x {height}"
    for number, mask in enumerate(facts.get("masks", [])):
        try:
            check_mask(mask, width, height)
        except OutlineError as error:
            yield f"mask {number} {error}"


def _semantic_faults(data: bytes, width: int, height: int, num_semantic: int) -> Iterator[str]:
    try:
        mask = decode_indexes(data)
    except DataError as error:
        yield f"semantic mask: {error}"
        return
    if mask.shape != (height, width):
        yield f"semantic mask of {mask.shape[1]} x {mask.shape[0]} for an image of {width} x {height}"
    used = np.flatnonzero(np.bincount(mask.ravel(), minlength=IGNORE + 1)[:IGNORE])
    if used.size and used[-1] >= num_semantic:
        yield f"semantic value {used[-1]} of {num_semantic} semantic classes"
