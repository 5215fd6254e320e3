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
from itertools import pairwise
from pathlib import Path
from typing import Any

from data_pipeline.errors import DataError
from data_pipeline.files import read_file
from data_pipeline.folders import entries, is_image
from data_pipeline.sources.annotations import OtherSizeError, OutlineError, clean_boxes, outline_mask
from data_pipeline.sources.listing import Job, Listing, Rejected, Sample, UnusableError, choose_splits
from data_pipeline.sources.reading import read_picture, refuse_turned

FILE = re.compile(r"instances_(([A-Za-z]+)[0-9]*)\.(?i:json)")
OTHER_ANNOTATIONS = ("captions_", "person_keypoints_", "stuff_", "panoptic_", "image_info_")  # COCO's, without objects
LARGEST_JSON = 2**34  # bytes; COCO's own has half a gigabyte
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
    for path in entries(root / "annotations"):
        if (match := FILE.fullmatch(path.name)) is None:
            if not path.name.startswith(OTHER_ANNOTATIONS):
                reason = "is not read; files of objects are called instances_SPLIT.json, as instances_train2017.json"
                rejected.append(Rejected(f"annotations/{path.name}", "file", reason))
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
    given = json.loads(job.annotations)
    if given:
        refuse_turned(picture, job.size)
    if job.size != (width, height):
        raise UnusableError(f"its annotation is of an image of {job.size[0]} x {job.size[1]}, it is {width} x {height}")
    clean = clean_boxes([(x, y, x + w, y + h) for x, y, w, h in (item["box"] for item in given)], width, height)
    kept = [given[index] for index in clean.kept]
    sample = Sample(
        *picture[:4],
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
        content = json.loads(read_file(path, LARGEST_JSON))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
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
        names = {_whole(entry, "id"): _text(entry, "name") for entry in content["categories"]}
    except KeyError as error:
        raise DataError(f"{path}: a category without {error}; each needs an id and a name") from error
    except ValueError as error:
        raise DataError(f"{path}: a category: {error}; mend it") from error
    if len(names) != len(content["categories"]):
        raise DataError(f"{path}: two categories have one id; give each its own")
    return names


def _jobs(
    root: Path, path: Path, content: dict[str, Any], categories: dict[int, str]
) -> tuple[tuple[Job, ...], list[Rejected]]:
    """Jobs of the images of a file in the order of their ids, and what has no image."""
    folder = root / path.stem.removeprefix("instances_")
    there = {entry.name for entry in entries(folder)}
    labels = {number: label for label, number in enumerate(sorted(categories))}
    by_image: dict[int, list[dict[str, Any]]] = {}
    num_crowds = 0
    for entry in content["annotations"]:
        image_id, annotation = _annotation(path, entry, labels)
        by_image.setdefault(image_id, []).append(annotation)
        num_crowds += annotation["iscrowd"]
    jobs: list[Job] = []
    rejected: list[Rejected] = []
    images = sorted(_image(path, entry) for entry in content["images"])
    for (image_id, *_), (following, *_) in pairwise(images):
        if image_id == following:
            raise DataError(f"{path}: two images have the id {image_id}; give each its own")
    for image_id, name, size in images:
        annotations = by_image.pop(image_id, [])
        if name in there:
            jobs.append(CocoJob(folder / name, root, image_id, size, json.dumps(annotations)))
        else:
            rejected.append(Rejected(f"{folder.name}/{name}", "image", f"is listed in {path.name}, but not there"))
    listed = {name for _, name, _ in images}
    if unlisted := sum(is_image(Path(name)) and name not in listed for name in there):
        rejected.append(Rejected(folder.name, "image", f"in the folder, but not listed in {path.name}", unlisted))
    for image_id, annotations in sorted(by_image.items()):
        reason = f"of image {image_id}, which the file does not list"
        rejected.append(Rejected(str(path.relative_to(root)), "annotation", reason, len(annotations)))
    if num_crowds:
        whole = "all" if num_crowds == len(content["annotations"]) else f"{num_crowds} of {len(content['annotations'])}"
        reason = f"{whole} objects are crowds (iscrowd 1), of which no detector learns"
        rejected.append(Rejected(str(path.relative_to(root)), "crowd", reason, num_crowds))
    return tuple(jobs), rejected


def _image(path: Path, entry: dict[str, Any]) -> tuple[int, str, tuple[int, int]]:
    try:
        name = _text(entry, "file_name")
        image_id, size = _whole(entry, "id"), (_whole(entry, "width"), _whole(entry, "height"))
    except (KeyError, ValueError) as error:
        raise _refused(path, "image", entry, error) from error
    if Path(name).name != name:
        raise DataError(f"{path}: image {image_id}: file_name {name!r} is no plain file name; mend or remove it")
    return image_id, name, size


def _annotation(path: Path, entry: dict[str, Any], labels: dict[int, int]) -> tuple[int, dict[str, Any]]:
    """An annotation's image id, and the facts of it that a job carries."""
    try:
        category, image_id = _whole(entry, "category_id"), _whole(entry, "image_id")
        box = _numbers(entry["bbox"], "bbox")
        area = None if entry.get("area") is None else _number(entry["area"], "area")
        if area is not None and not math.isfinite(area):
            raise ValueError(f"area {area} is no number of pixels")
        if len(box) != 4:
            raise ValueError(f"bbox has {len(box)} numbers instead of 4")
        outline = _outline(entry.get("segmentation") or None)
        crowd = _flag(entry, "iscrowd")
    except (KeyError, ValueError) as error:
        raise _refused(path, "annotation", entry, error) from error
    if category not in labels:
        raise DataError(
            f"{path}: annotation {entry.get('id')!r}: category_id {category} is not one of its {len(labels)} "
            "categories; add the category or mend the annotation"
        )
    return image_id, {"label": labels[category], "box": box, "outline": outline, "iscrowd": crowd, "area": area}


def _refused(path: Path, kind: str, entry: dict[str, Any], error: KeyError | ValueError) -> DataError:
    what = f"has no {error.args[0]!r}" if isinstance(error, KeyError) else str(error)
    return DataError(f"{path}: {kind} {entry.get('id')!r}: {what}; mend the entry or remove it")


def _outline(outline: Any) -> Any:
    """Polygons or an RLE with numbers for what may be their text."""
    if outline is None:
        return None
    if isinstance(outline, list):
        return [_numbers(polygon, "a polygon") for polygon in outline]
    if not isinstance(outline, dict):
        raise ValueError(f"segmentation {outline!r} is neither polygons nor an RLE")
    lists = {
        key: [_whole({key: value}, key) for value in outline[key]]
        for key in ("size", "counts")
        if isinstance(outline.get(key), list)
    }
    return {**outline, **lists}


def _numbers(values: Any, name: str) -> list[float]:
    if not isinstance(values, list):
        raise ValueError(f"{name} {values!r} is no list of numbers")
    return [_number(value, name) for value in values]


def _number(value: Any, name: str) -> float:
    """A JSON number, or its text; what Python would make a number as well, as `true`, is none."""
    try:
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise ValueError
        return float(value)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{name}: {value!r} is no number") from error


def _whole(entry: dict[str, Any], name: str) -> int:
    """A whole number, or its text; ids may have more digits than a float."""
    value = entry[name]
    try:
        if isinstance(value, str) or type(value) is int:
            return int(value)
        if _number(value, name).is_integer():
            return int(value)
    except ValueError as error:
        raise ValueError(f"{name}: {value!r} is no whole number") from error
    raise ValueError(f"{name}: {value!r} is no whole number")


def _flag(entry: dict[str, Any], name: str) -> int:
    """0 or 1 of 0, 1, false, true or their text; 0 where the entry does not say."""
    value = entry.get(name, 0)
    text = str(value).lower() if isinstance(value, bool | int | float | str) else ""
    if text in ("0", "0.0", "false"):
        return 0
    if text in ("1", "1.0", "true"):
        return 1
    raise ValueError(f"{name}: {value!r} is neither 0 nor 1")


def _text(entry: dict[str, Any], name: str) -> str:
    """A text; a class of digits may be called by a number."""
    value = entry[name]
    if isinstance(value, str) or type(value) is int:
        return str(value)
    raise ValueError(f"{name}: {value!r} is no text")
