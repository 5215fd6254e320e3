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
occurs, else the names that occur in train. Suffixes may be in capitals.

Source: Everingham et al., "The PASCAL Visual Object Classes Challenge", IJCV 2010, and its development kits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.files import read_file
from data_pipeline.folders import entries, is_image
from data_pipeline.sources.annotations import clean_boxes
from data_pipeline.sources.listing import Job, Listing, Rejected, Sample, UnusableError, choose_splits
from data_pipeline.sources.reading import encode_mask, read_mask, read_picture, refuse_turned

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
    filename: str  # of its image, as it says; often of another one
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

    pictures = _by_name(root / "JPEGImages")
    masks = _one_by_name(root / "SegmentationClass", ".png")
    notes = _one_by_name(root / "Annotations", ".xml")
    wanted = list(dict.fromkeys(name for path in chosen.values() for name in _names(path)))
    annotations: dict[str, _Annotation] = {}
    unreadable: dict[str, str] = {}
    for name in wanted:
        if name in notes:
            try:
                annotations[name] = _annotation(notes[name])
            except UnusableError as error:
                unreadable[name] = str(error)
    images, rejected = _images(root, wanted, pictures, annotations)
    train = _names(chosen["train"]) if "train" in chosen else list(annotations)
    classes = _classes(root, [annotations[name] for name in train if name in annotations])
    for annotation in annotations.values():
        _check_names(annotation, classes, root)

    jobs: dict[str, tuple[Job, ...]] = {}
    for split, path in chosen.items():
        listed = str(path.relative_to(root))
        names = _names(path)
        annotated = any(name in notes for name in names)
        samples: list[Job] = []
        for name in names:
            if name not in images and name in pictures:
                other = pictures[name][0]
                reason = f"is listed in {listed}, but ends in {other.suffix or 'no suffix'}, which is not read"
                rejected.append(Rejected(str(other.relative_to(root)), "image", reason))
            elif name not in images:
                rejected.append(Rejected(f"JPEGImages/{name}.jpg", "image", f"is listed in {listed}, but not there"))
            elif name in unreadable:
                rejected.append(Rejected(str(images[name].relative_to(root)), "image", unreadable[name]))
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
                samples.append(VocJob(images[name], root, objects, size, masks.get(name), classes))
        jobs[split] = tuple(samples)
    has_masks = any(isinstance(job, VocJob) and job.mask for samples in jobs.values() for job in samples)
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
    if job.objects:
        refuse_turned(picture, job.size)
    if job.size is not None and job.size != (picture.width, picture.height):
        raise UnusableError(
            f"its annotation is of an image of {job.size[0]} x {job.size[1]}, it is {picture.width} x {picture.height}"
        )
    sample = Sample(*picture[:4], image_id=job.file.stem)
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
        refuse_turned(picture, (picture.width, picture.height))
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
    folders = [path for place in (root, root / "VOCdevkit") if place.is_dir() for path in entries(place)]
    inner = sorted(path for path in folders if (path / "JPEGImages").is_dir())
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


def _by_name(folder: Path) -> dict[str, list[Path]]:
    """What lies in a folder, by its name without suffix."""
    found: dict[str, list[Path]] = {}
    for path in entries(folder):
        found.setdefault(path.stem, []).append(path)
    return found


def _one_by_name(folder: Path, suffix: str) -> dict[str, Path]:
    """The files of a folder that end in `suffix`, in capitals, too, by their name without it."""
    found: dict[str, Path] = {}
    for path in entries(folder):
        if path.suffix.lower() == suffix and (first := found.setdefault(path.stem, path)) is not path:
            raise DataError(f"{first} and {path} are both of {path.stem}; move one away")
    return found


def _images(
    root: Path, names: list[str], pictures: dict[str, list[Path]], annotations: dict[str, _Annotation]
) -> tuple[dict[str, Path], list[Rejected]]:
    """The image of each name that has one; of several, that which its annotation names, the others listed.

    Raises:
        DataError: several, of which no annotation tells which one is meant.
    """
    images: dict[str, Path] = {}
    rejected: list[Rejected] = []
    for name in names:
        found = [path for path in pictures.get(name, ()) if is_image(path)]
        filename = annotations[name].filename if name in annotations else None
        meant = [path for path in found if len(found) == 1 or path.name == filename]
        if found and not meant:
            raise DataError(
                f"{found[0]} and {found[1]} are both images of {name}; say in <filename> of Annotations/{name}.xml "
                "which one its boxes are of, or move one away"
            )
        for path in found:
            if path in meant:
                images[name] = path
            else:
                reason = f"Annotations/{name}.xml is of {filename}"
                rejected.append(Rejected(str(path.relative_to(root)), "image", reason))
    return images, rejected


def _names(path: Path) -> list[str]:
    """Image names of a list, each once."""
    try:
        lines = map(str.strip, read_file(path).decode("utf-8-sig").splitlines())
        return list(dict.fromkeys(filter(None, lines)))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not a text file of image names ({error}); mend it") from error


def _annotation(path: Path) -> _Annotation:
    """The annotation of a file (DataError: broken; UnusableError: of another kind)."""
    try:
        tree = ElementTree.parse(path).getroot()
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise DataError(f"{path}: broken XML ({error}); mend it, or take its image off the list") from error
    for element in tree.iter():
        element.tag = element.tag.rpartition("}")[2]  # without its namespace
    if tree.tag != "annotation":
        raise UnusableError(f"Annotations/{path.name} is no VOC annotation: its root is <{tree.tag}>, not <annotation>")
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
                difficult=_flag(item, "difficult"),
            )
            for item in tree.findall("object")
        )
        width, height = (_pixels(tree, f"size/{side}") for side in ("width", "height"))
    except ValueError as error:
        raise DataError(f"{path}: {error}; mend it, or take its image off the list") from error
    filename = (tree.findtext("filename") or "").strip()
    return _Annotation(path, filename, objects, (width, height) if width and height else None)


def _text(item: ElementTree.Element, tag: str) -> str:
    text = (item.findtext(tag) or "").strip()
    if not text:
        raise ValueError(f"an object without <{tag.replace('/', '><')}>")
    return text


def _flag(item: ElementTree.Element, tag: str) -> bool:
    """0, 1, false or true; false where the object does not say."""
    text = (item.findtext(tag) or "").strip().lower()
    if text not in ("", "0", "1", "false", "true"):
        raise ValueError(f"<{tag}> {text!r} is neither 0 nor 1")
    return text in ("1", "true")


def _pixels(tree: ElementTree.Element, tag: str) -> int:
    """A whole number; 0 where the file does not say."""
    number = float((tree.findtext(tag) or "").strip() or 0)
    if not number.is_integer():
        raise ValueError(f"<{tag.replace('/', '><')}> {number:g} is no whole number")
    return int(number)


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
