"""COCO instances, 2014 or 2017, and sets in its layout.

    SRC/
      train2017/*.jpg  val2017/*.jpg
      annotations/instances_train2017.json  instances_val2017.json

A split is named without its year. Classes are the categories in the order of their ids, numbered without gaps;
`image_id` is COCO's. Polygons and crowds become RLE of the image's size. Boxes keep `iscrowd` and COCO's area, by
which its evaluation sorts small objects from large ones. Images without annotations stay: they have no boxes.

Source: Lin et al., "Microsoft COCO: Common Objects in Context", ECCV 2014, and its data format.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.errors import DataError
from data_pipeline.sources.annotations import OtherSizeError, OutlineError, clean_boxes, outline_mask
from data_pipeline.sources.listing import Job, Listing, Rejected, Sample, UnusableError, choose_splits
from data_pipeline.sources.reading import read_picture

FILE = re.compile(r"instances_(([A-Za-z]+)[0-9]*)\.json")
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class CocoJob(Job):
    """An image, its size as noted, and its annotations as JSON, a tenth of the memory that the objects take."""

    image_id: int
    size: tuple[int, int]
    annotations: str  # [{"label", "box" [x, y, width, height], "outline", "iscrowd", "area"}, ...]


def list_source(root: Path, splits: Mapping[str, str] | None = None) -> Listing:
    """Categories, and the images of each split with their annotations.

    Raises:
        DataError: no annotation file with its folder of images, broken JSON, an unknown category, or categories
            that differ between splits.
    """
    found: dict[str, Path] = {}
    rejected: list[Rejected] = []
    for path in sorted((root / "annotations").glob("instances_*.json")):
        if (match := FILE.fullmatch(path.name)) is None:
            continue
        folder, split = match.groups()
        if not (root / folder).is_dir():
            rejected.append(Rejected(f"annotations/{path.name}", "annotation", f"its folder {folder} is not there"))
        elif split in found:
            raise DataError(f"{root}: {found[split].name} and {path.name} are both of {split}; move one away")
        else:
            found[split] = path
    if not found:
        raise DataError(
            f"{root}: no annotations/instances_train2017.json beside train2017/ (nor val2017); name a COCO folder"
        )
    order = sorted(found, key=lambda split: (SPLITS.index(split) if split in SPLITS else len(SPLITS), split))
    names: dict[int, str] = {}
    jobs: dict[str, tuple[Job, ...]] = {}
    for split, path in choose_splits(found, splits, {split: split for split in order}, root).items():
        content = _load(path)
        categories = _categories(path, content)
        if names and categories != names:
            raise DataError(f"{path}: its categories are not those of the other splits; mend one of the files")
        names = categories
        listed, missing = _jobs(root, path, content, categories)
        jobs[split] = listed
        rejected += missing
    return Listing(root, tuple(names[number] for number in sorted(names)), (), jobs, tuple(rejected), read_sample)


def read_sample(job: CocoJob) -> Sample:
    """The image of a job with its boxes inside the image and their masks."""
    picture = read_picture(job.file)
    width, height = picture.width, picture.height
    if job.size != (width, height):
        raise UnusableError(f"its annotation is of an image of {job.size[0]} x {job.size[1]}, it is {width} x {height}")
    given = json.loads(job.annotations)
    clean = clean_boxes([(x, y, x + w, y + h) for x, y, w, h in (item["box"] for item in given)], width, height)
    kept = [given[index] for index in clean.kept]
    sample = Sample(
        *picture,
        boxes=clean.boxes,
        labels=[item["label"] for item in kept],
        iscrowd=[item["iscrowd"] for item in kept],
        image_id=job.image_id,
    )
    if all(item["area"] is not None for item in kept):
        sample.areas = [item["area"] for item in kept]
    for index in clean.dropped:
        shown = " ".join(f"{value:g}" for value in given[index]["box"])
        sample.remarks.append(
            Rejected(job.name, "box", f"box (x y width height) {shown} has no area inside {width} x {height}")
        )
    if clean.num_clipped:
        reason = f"boxes reached beyond {width} x {height}"
        sample.remarks.append(Rejected(job.name, "clipped", reason, clean.num_clipped))
    if any(item["outline"] for item in kept):
        try:
            sample.masks = [outline_mask(item["outline"], width, height) for item in kept]
        except OtherSizeError as error:
            raise UnusableError(f"an outline {error}") from error
        except OutlineError as error:
            sample.remarks.append(Rejected(job.name, "masks", f"an outline {error}"))
    return sample


def _load(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: broken JSON ({error}); fetch or export it again") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: not a JSON object; COCO's has images, annotations and categories")
    for part in ("images", "annotations", "categories"):
        entries = content.get(part)
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise DataError(f"{path}: has no list {part!r} of objects; COCO's has images, annotations and categories")
    return content


def _categories(path: Path, content: dict[str, Any]) -> dict[int, str]:
    try:
        names = {int(entry["id"]): str(entry["name"]) for entry in content["categories"]}
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: a category without {error}; each needs an id and a name") from error
    if len(names) != len(content["categories"]):
        raise DataError(f"{path}: two categories have one id; give each its own")
    return names


def _jobs(
    root: Path, path: Path, content: dict[str, Any], categories: dict[int, str]
) -> tuple[tuple[Job, ...], list[Rejected]]:
    """Jobs of the images of a file in the order of their ids, and what has no image."""
    folder = root / path.stem.removeprefix("instances_")
    there = {entry.name for entry in folder.iterdir()}
    labels = {number: label for label, number in enumerate(sorted(categories))}
    by_image: dict[int, list[dict[str, Any]]] = {}
    for entry in content["annotations"]:
        image_id, annotation = _annotation(path, entry, labels)
        by_image.setdefault(image_id, []).append(annotation)
    jobs: list[Job] = []
    rejected: list[Rejected] = []
    for image_id, name, size in sorted(_image(path, entry) for entry in content["images"]):
        annotations = by_image.pop(image_id, [])
        if name in there:
            jobs.append(CocoJob(folder / name, root, image_id, size, json.dumps(annotations)))
        else:
            rejected.append(Rejected(f"{folder.name}/{name}", "image", f"is listed in {path.name}, but not there"))
    if len({job.image_id for job in jobs if isinstance(job, CocoJob)}) != len(jobs):
        raise DataError(f"{path}: two images have one id; give each its own")
    for image_id, annotations in sorted(by_image.items()):
        reason = f"of image {image_id}, which the file does not list"
        rejected.append(Rejected(str(path.relative_to(root)), "annotation", reason, len(annotations)))
    return tuple(jobs), rejected


def _image(path: Path, entry: dict[str, Any]) -> tuple[int, str, tuple[int, int]]:
    try:
        name = str(entry["file_name"])
        image_id, size = int(entry["id"]), (int(entry["width"]), int(entry["height"]))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: image {entry.get('id')!r}: {error!r}; mend the entry or remove it") from error
    if Path(name).name != name:
        raise DataError(f"{path}: image {image_id}: file_name {name!r} is no plain file name; mend or remove it")
    return image_id, name, size


def _annotation(path: Path, entry: dict[str, Any], labels: dict[int, int]) -> tuple[int, dict[str, Any]]:
    """An annotation's image id, and the facts of it that a job carries."""
    try:
        category, image_id = int(entry["category_id"]), int(entry["image_id"])
        box = [float(value) for value in entry["bbox"]]
        area = None if entry.get("area") is None else float(entry["area"])
        if area is not None and not math.isfinite(area):
            raise ValueError(f"area {area} is no number of pixels")
        outline = entry.get("segmentation") or None
        if len(box) != 4:
            raise ValueError(f"bbox has {len(box)} numbers instead of 4")
        if isinstance(outline, list):
            outline = [[float(value) for value in polygon] for polygon in outline]
        elif outline is not None and not isinstance(outline, dict):
            raise ValueError(f"segmentation {outline!r} is neither polygons nor an RLE")
        crowd = int(bool(entry.get("iscrowd", 0)))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: annotation {entry.get('id')!r}: {error!r}; mend the entry or remove it") from error
    if category not in labels:
        raise DataError(
            f"{path}: annotation {entry.get('id')!r}: category_id {category} is not one of its {len(labels)} "
            "categories; add the category or mend the annotation"
        )
    return image_id, {"label": labels[category], "box": box, "outline": outline, "iscrowd": crowd, "area": area}
