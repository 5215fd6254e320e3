"""From a source to shards: every image is decoded once; what does not decode is left out and listed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from data_pipeline.errors import DataError
from data_pipeline.parallel import ordered_map
from data_pipeline.shards import Manifest, ShardWriter, Split, new_dataset
from data_pipeline.sources import Sample
from data_pipeline.sources.imagefolder import SUFFIXES, ImageFolder, list_images

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
    num_processes: int | None = None,
    on_total: Callable[[int], None] | None = None,
    progress: Callable[[], None] | None = None,
) -> tuple[Manifest, list[Rejected]]:
    """Build the data set `out` from a folder of images; returns its manifest and what was left out.

    `out` appears when it is complete, and not at all on an error. Equal input gives equal bytes, whatever the
    number of processes.

    Args:
        val_fraction: share of the images, every n-th, that becomes the val split where the source has none.
        num_processes: for decoding; None is one a core.
        on_total, progress: called with the number of files, and after each of them.

    Raises:
        DataError: nothing to build from, `out` is there already, or no image decodes.
    """
    images = list_images(source)
    splits = _splits(images, val_fraction)
    if on_total is not None:
        on_total(sum(map(len, splits.values())))
    rejected = [Rejected(str(path), "lies beside the class folders, so it has no class") for path in images.strays]
    built: dict[str, Split] = {}
    with new_dataset(out) as folder:
        # With it comes torch: after bad folders were refused, but before the processes fork, which then share it.
        import data_pipeline.loader  # noqa: F401

        for name, files in splits.items():
            with ShardWriter(folder, name) as writer:
                for number, result in enumerate(ordered_map(read_sample, files, num_processes)):
                    if isinstance(result, Rejected):
                        rejected.append(result)
                    else:
                        writer.write(result.fields(f"{name}-{number:08d}"))
                    if progress is not None:
                        progress()
            if writer.shards:
                built[name] = Split(tuple(writer.shards))
        if not built:
            first = rejected[-1]
            raise DataError(
                f"{source}: none of its {len(rejected)} images decodes ({first.file}: {first.reason}); "
                "name a folder of JPEG, PNG or WebP images"
            )
        if rejected:
            (folder / REJECTED).write_text("".join(json.dumps(asdict(item)) + "\n" for item in rejected))
        manifest = Manifest(source.resolve().name, images.classes, built)
        manifest.save(folder)
    return manifest, rejected


def read_sample(job: Job) -> Sample | Rejected:
    """The file of a job as a sample, decoded once to see that it can be."""
    from data_pipeline.loader import decode_image

    path, label = job
    try:
        data = path.read_bytes()
        height, width = decode_image(data).shape[:2]
    except OSError as error:
        return Rejected(str(path), f"cannot be read ({error.strerror})")
    except DataError as error:
        return Rejected(str(path), str(error))
    return Sample(data, SUFFIXES[path.suffix.lower()], width, height, label, image_id=path.stem)


def _splits(images: ImageFolder, val_fraction: float) -> dict[str, list[Job]]:
    """Files by split, every n-th of train set aside where there is no val; classes keep their shares."""
    if not 0 <= val_fraction < 1:
        raise DataError(f"val-fraction={val_fraction:g} must be at least 0 and less than 1")
    splits = {listing.split: list(listing.files) for listing in images.listings}
    if val_fraction == 0 or "val" in splits or "train" not in splits:
        return splits
    parts: tuple[list[Job], list[Job]] = ([], [])
    for number, job in enumerate(splits["train"]):
        parts[int((number + 1) * val_fraction) > int(number * val_fraction)].append(job)
    return {**splits, "train": parts[0], "val": parts[1]}
