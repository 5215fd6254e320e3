"""Pascal VOC 2007 to 2012, and sets in its layout.

    SRC/                        VOC2012, or a VOCdevkit that holds one such folder
      JPEGImages/ID.jpg
      Annotations/ID.xml        boxes; 1-based inclusive pixels in the file, 0-based half-open in the shards
      ImageSets/Main/{train,val,trainval,test}.txt
      ImageSets/Segmentation/{train,val,trainval,test}.txt
      SegmentationClass/ID.png  palette indexes: 0 background, k + 1 class k, 255 void
      classes.txt               ours, optional: class names, one a line

Splits are those of ImageSets/Main, with the semantic mask of each image that has one; where there is no train.txt,
trainval becomes train. The lists of ImageSets/Segmentation, all of whose images have masks, are the splits
"Segmentation/train" and so on. Classes are those of classes.txt; without it the official twenty if any of their names
occurs, else the names that occur in train.

Source: Everingham et al., "The PASCAL Visual Object Classes Challenge", IJCV 2010, and its development kits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.sources.annotations import clean_boxes
from data_pipeline.sources.listing import Job, Listing, Rejected, Sample, UnusableError, choose_splits
from data_pipeline.sources.reading import SUFFIXES, encode_mask, read_mask, read_picture

CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
BACKGROUND, VOID = "background", 255
SPLITS = ("train", "val", "trainval", "test")


@dataclass(frozen=True)
class VocObject:
    """A box as the file gives it (xmin, ymin, xmax, ymax; 1-based, inclusive) and what it holds."""

    name: str
    corners: tuple[float, float, float, float]
    difficult: bool


@dataclass(frozen=True)
class VocJob(Job):
    """An image, its objects (None: not annotated), the size its annotation notes, and its semantic mask."""

    objects: tuple[VocObject, ...] | None
    size: tuple[int, int] | None
    mask: Path | None
    classes: tuple[str, ...]


@dataclass(frozen=True)
class _Annotation:
    file: Path
    objects: tuple[VocObject, ...]
    size: tuple[int, int] | None  # width, height; None where the file leaves it out or has zeros


def list_source(root: Path, splits: Mapping[str, str] | None = None) -> Listing:
    """Classes, and the images of each split with their objects.

    Raises:
        DataError: no VOC folder, no image list, broken XML, or a class that is not among the classes.
    """
    root = _voc_folder(root)
    lists = _image_lists(root)
    defaults = {split: split for split in SPLITS if split in lists and split != "trainval"}
    if "train" not in lists and "trainval" in lists:
        defaults = {"train": "trainval", **defaults}
    if not defaults:  # a set for segmentation alone
        defaults = {name.removeprefix("Segmentation/"): name for name in lists if not name.endswith("/trainval")}
    chosen = choose_splits(lists, splits, defaults, root)

    images = {path.stem: path for path in sorted((root / "JPEGImages").iterdir()) if path.suffix.lower() in SUFFIXES}
    masks = {path.stem: path for path in sorted((root / "SegmentationClass").glob("*.png"))}
    notes = {path.stem for path in (root / "Annotations").glob("*.xml")}
    annotations = {
        name: _annotation(root / "Annotations" / f"{name}.xml")
        for name in dict.fromkeys(name for path in chosen.values() for name in _names(path))
        if name in notes
    }
    train = _names(chosen["train"]) if "train" in chosen else list(annotations)
    classes = _classes(root, [annotations[name] for name in train if name in annotations])
    for annotation in annotations.values():
        _check_names(annotation, classes, root)

    jobs: dict[str, tuple[Job, ...]] = {}
    rejected: list[Rejected] = []
    for split, path in chosen.items():
        listed = str(path.relative_to(root))
        names = _names(path)
        annotated = any(name in notes for name in names)
        found: list[Job] = []
        for name in names:
            if name not in images:
                rejected.append(Rejected(f"JPEGImages/{name}.jpg", "image", f"is listed in {listed}, but not there"))
            elif annotated and name not in notes:
                rejected.append(
                    Rejected(str(images[name].relative_to(root)), "image", f"Annotations/{name}.xml is missing")
                )
            elif path.parent.name == "Segmentation" and name not in masks:
                rejected.append(
                    Rejected(str(images[name].relative_to(root)), "image", f"SegmentationClass/{name}.png is missing")
                )
            else:
                note = annotations.get(name)
                objects, size = (note.objects, note.size) if note else (None, None)
                found.append(VocJob(images[name], root, objects, size, masks.get(name), classes))
        jobs[split] = tuple(found)
    has_masks = any(isinstance(job, VocJob) and job.mask for found in jobs.values() for job in found)
    return Listing(
        root=root,
        classes=classes,
        semantic_classes=(BACKGROUND, *classes) if has_masks else (),
        splits=jobs,
        rejected=tuple(rejected),
        read=read_sample,
    )


def read_sample(job: VocJob) -> Sample:
    """The image of a job with its boxes inside the image, and its semantic mask."""
    picture = read_picture(job.file)
    if job.size is not None and job.size != (picture.width, picture.height):
        raise UnusableError(
            f"its annotation is of an image of {job.size[0]} x {job.size[1]}, it is {picture.width} x {picture.height}"
        )
    sample = Sample(*picture, image_id=job.file.stem)
    if job.objects is not None:
        # Pixel 1 of the file is our pixel 0, and the last pixel lies inside the box.
        corners = [(left - 1, top - 1, right, bottom) for left, top, right, bottom in (o.corners for o in job.objects)]
        clean = clean_boxes(corners, picture.width, picture.height)
        kept = [job.objects[index] for index in clean.kept]
        sample.boxes = clean.boxes
        sample.labels = [job.classes.index(item.name) for item in kept]
        sample.difficult = [item.difficult for item in kept]
        for index in clean.dropped:
            shown = " ".join(f"{value:g}" for value in job.objects[index].corners)
            reason = f"{job.objects[index].name} at {shown} has no area inside {picture.width} x {picture.height}"
            sample.remarks.append(Rejected(job.name, "box", reason))
        if clean.num_clipped:
            reason = f"boxes reached beyond {picture.width} x {picture.height}"
            sample.remarks.append(Rejected(job.name, "clipped", reason, clean.num_clipped))
    if job.mask is not None:
        values = read_mask(job.mask, picture.width, picture.height)
        if (wrong := values[(values > len(job.classes)) & (values != VOID)]).size:
            raise DataError(
                f"{job.mask}: value {wrong[0]} is no class: 0 is background, 1..{len(job.classes)} are the classes, "
                f"255 is void; mend the mask, or list all classes in {job.root / 'classes.txt'}"
            )
        sample.semantic = encode_mask(np.ascontiguousarray(values))
    return sample


def _voc_folder(root: Path) -> Path:
    """The folder with JPEGImages: `root`, or the only one below it, as in a VOCdevkit."""
    if (root / "JPEGImages").is_dir():
        return root
    inner = sorted(path.parent for pattern in ("*/JPEGImages", "VOCdevkit/*/JPEGImages") for path in root.glob(pattern))
    if len(inner) > 1:
        raise DataError(f"{root}: holds several sets ({', '.join(path.name for path in inner)}); name one of them")
    if not inner:
        raise DataError(f"{root}: no JPEGImages in it; name a VOC folder (JPEGImages, Annotations, ImageSets)")
    return inner[0]


def _image_lists(root: Path) -> dict[str, Path]:
    """Files that list a split's images, by the split's name."""
    lists = {split: root / "ImageSets" / "Main" / f"{split}.txt" for split in SPLITS}
    lists |= {f"Segmentation/{split}": root / "ImageSets" / "Segmentation" / f"{split}.txt" for split in SPLITS}
    if not (there := {name: path for name, path in lists.items() if path.is_file()}):
        raise DataError(f"{root}: no ImageSets/Main/train.txt, val.txt, trainval.txt or test.txt; add the image lists")
    return there


def _names(path: Path) -> list[str]:
    """Image names of a list, each once."""
    try:
        return list(dict.fromkeys(line.strip() for line in path.read_text().splitlines() if line.strip()))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not a text file of image names ({error}); mend it") from error


def _annotation(path: Path) -> _Annotation:
    try:
        tree = ElementTree.parse(path).getroot()
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise DataError(f"{path}: broken XML ({error}); mend it, or take its image off the list") from error
    try:
        objects = tuple(
            VocObject(
                name=_text(item, "name"),
                corners=(
                    float(_text(item, "bndbox/xmin")),
                    float(_text(item, "bndbox/ymin")),
                    float(_text(item, "bndbox/xmax")),
                    float(_text(item, "bndbox/ymax")),
                ),
                difficult=bool(int(item.findtext("difficult") or 0)),
            )
            for item in tree.findall("object")
        )
        width, height = (int(float(tree.findtext(f"size/{side}") or 0)) for side in ("width", "height"))
    except (ValueError, OverflowError) as error:
        raise DataError(f"{path}: {error}; mend it, or take its image off the list") from error
    return _Annotation(path, objects, (width, height) if width and height else None)


def _text(item: ElementTree.Element, tag: str) -> str:
    text = (item.findtext(tag) or "").strip()
    if not text:
        raise ValueError(f"an object without <{tag.replace('/', '><')}>")
    return text


def _classes(root: Path, annotations: list[_Annotation]) -> tuple[str, ...]:
    """The names of classes.txt, or the official ones, or those of `annotations` in alphabetical order."""
    path = root / "classes.txt"
    if path.is_file():
        if not (names := _names(path)):
            raise DataError(f"{path}: is empty; list the class names in it, one a line, or remove it")
        return tuple(names)
    names = sorted({item.name for annotation in annotations for item in annotation.objects})
    return CLASSES if not names or any(name in CLASSES for name in names) else tuple(names)


def _check_names(annotation: _Annotation, classes: tuple[str, ...], root: Path) -> None:
    for item in annotation.objects:
        if item.name not in classes:
            known = ", ".join(classes[:3]) + (", ..." if len(classes) > 3 else "")
            raise DataError(
                f"{annotation.file}: class {item.name!r} is not one of the {len(classes)} classes ({known}); "
                f"mend the name, or list all classes in {root / 'classes.txt'}, one a line"
            )
