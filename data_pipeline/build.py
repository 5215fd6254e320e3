"""From a source to shards: every image is decoded once, what does not decode is left out and listed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import cv2
import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.loader import decode_image
from data_pipeline.shards import Manifest, ShardWriter, Split, new_dataset
from data_pipeline.sources import Sample
from data_pipeline.sources.imagefolder import SUFFIXES, list_images

REJECTED = "rejected.jsonl"
Job = tuple[Path, int | None]


@dataclass(frozen=True)
class Rejected:
    """A file that was left out, and why."""

    file: str
    reason: str


def build_imagefolder(
    source: Path,
    out: Path,
    *,
    val_fraction: float = 0.0,
    num_processes: int = 2,
    on_total: Callable[[int], None] | None = None,
    progress: Callable[[], None] | None = None,
) -> tuple[Manifest, list[Rejected]]:
    """Build the data set `out` from a folder of images; returns its manifest and what was left out.

    Args:
        val_fraction: share of the images, every n-th, that becomes the val split where the source has none.
        on_total, progress: called with the number of files, and after each of them.

    Raises:
        DataError: nothing to build from, `out` is there already, or no image decodes.
    """
    classes, listings = list_images(source)
    splits = _with_val({listing.split: list(listing.files) for listing in listings}, val_fraction)
    if on_total is not None:
        on_total(sum(map(len, splits.values())))
    rejected: list[Rejected] = []
    built: dict[str, Split] = {}
    with new_dataset(out) as folder, ProcessPoolExecutor(num_processes, initializer=_one_thread) as pool:
        for name, files in splits.items():
            with ShardWriter(folder, name) as writer:
                for number, result in enumerate(pool.map(read_sample, files, chunksize=32)):
                    if isinstance(result, Rejected):
                        rejected.append(result)
                    else:
                        writer.write(result.fields(f"{name}-{number:08d}"))
                    if progress is not None:
                        progress()
            if writer.shards:
                built[name] = Split(tuple(writer.shards))
        if not built:
            raise DataError(f"{source}: none of its {len(rejected)} images decodes; the first: {rejected[0].reason}")
        if rejected:
            lines = [json.dumps({"file": str(item.file), "reason": item.reason}) + "\n" for item in rejected]
            (folder / REJECTED).write_text("".join(lines))
        manifest = Manifest(source.resolve().name, classes, built)
        manifest.save(folder)
    return manifest, rejected


def read_sample(job: Job) -> Sample | Rejected:
    """The file of a job as a sample, decoded once to see that it can be."""
    path, label = job
    try:
        data = path.read_bytes()
        height, width = decode_image(data).shape[:2]
    except (OSError, DataError) as error:
        return Rejected(str(path), str(error))
    return Sample(data, SUFFIXES[path.suffix.lower()], width, height, label, image_id=path.stem)


def _with_val(splits: dict[str, list[Job]], fraction: float) -> dict[str, list[Job]]:
    if not 0 <= fraction < 1:
        raise DataError(f"val-fraction={fraction:g} must lie in 0..1, 1 excluded")
    if fraction == 0 or "val" in splits or "train" not in splits:
        return splits
    chosen = np.floor(np.arange(1, len(splits["train"]) + 1) * fraction) > np.floor(np.arange(len(splits["train"])) * fraction)
    return {
        **splits,
        "train": [job for job, is_val in zip(splits["train"], chosen, strict=True) if not is_val],
        "val": [job for job, is_val in zip(splits["train"], chosen, strict=True) if is_val],
    }


def verify(root: Path, progress: Callable[[], None] | None = None) -> Iterator[str]:
    """Everything that is wrong with a data set, one line each: hashes, index, decoding, labels out of range."""
    from data_pipeline.shards import IMAGE_EXTENSIONS, ShardReader

    manifest = Manifest.load(root)
    for name, split in manifest.splits.items():
        for shard in split.shards:
            reader = ShardReader(root, Split((shard,)))
            for index in range(shard.samples):
                try:
                    sample = reader.read(index)
                except DataError as error:
                    yield str(error)
                    break
                yield from _faults(f"{shard.name}, sample {index} ({name})", sample, len(manifest.classes), IMAGE_EXTENSIONS)
            if progress is not None:
                progress()


def _faults(where: str, sample: dict[str, bytes], num_classes: int, extensions: Iterable[str]) -> Iterator[str]:
    image = next((sample[extension] for extension in extensions if extension in sample), None)
    try:
        if image is None:
            raise DataError("no image")
        decode_image(image)
        facts = json.loads(sample.get("json", b"{}"))
    except ValueError as error:
        yield f"{where}: {error}"
        return
    label = facts.get("label")
    for value in chain([] if label is None else [label], facts.get("labels", [])):
        if not 0 <= value < num_classes:
            yield f"{where}: label {value} of {num_classes} classes"


def _one_thread() -> None:
    cv2.setNumThreads(0)
