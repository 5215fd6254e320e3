"""Cityscapes, fine annotations, and sets in its layout.

    SRC/
      leftImg8bit/{train,val,test}/CITY/CITY_SEQ_FRAME_leftImg8bit.png
      gtFine/{train,val,test}/CITY/CITY_SEQ_FRAME_gtFine_labelIds.png

The 34 label ids become the 19 classes of the benchmark (train ids); every other id is 255, to be ignored. There is
no background class.

Source: Cordts et al., "The Cityscapes Dataset for Semantic Urban Scene Understanding", CVPR 2016, and the table of
labels in its scripts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.folders import entries
from data_pipeline.sources.listing import Job, Listing, Rejected, Sample, choose_splits
from data_pipeline.sources.reading import encode_mask, read_mask, read_picture, refuse_turned

# Class names by train id, each with its label id.
LABEL_IDS = {
    "road": 7, "sidewalk": 8, "building": 11, "wall": 12, "fence": 13, "pole": 17, "traffic light": 19,
    "traffic sign": 20, "vegetation": 21, "terrain": 22, "sky": 23, "person": 24, "rider": 25, "car": 26,
    "truck": 27, "bus": 28, "train": 31, "motorcycle": 32, "bicycle": 33,
}  # fmt: skip
CLASSES = tuple(LABEL_IDS)
NUM_LABEL_IDS = 34
IGNORE = 255  # in a file: label id -1, licence plates
SPLITS = ("train", "val", "test")
IMAGE, MASK = "_leftImg8bit.png", "_gtFine_labelIds.png"

TRAIN_IDS = np.full(256, IGNORE, np.uint8)
TRAIN_IDS[list(LABEL_IDS.values())] = np.arange(len(LABEL_IDS))


@dataclass(frozen=True)
class CityJob(Job):
    """An image and its mask of label ids (None: not annotated)."""

    mask: Path | None


def list_source(root: Path, splits: Mapping[str, str] | None = None) -> Listing:
    """The images of each split with their masks; a split without a folder of masks is unlabelled.

    Raises:
        DataError: no image in the layout, or masks of another kind than label ids.
    """
    rejected: list[Rejected] = []
    found: dict[str, list[Path]] = {}
    for split in SPLITS:
        for city in entries(root / "leftImg8bit" / split):
            images, others = _files(city, IMAGE)
            found.setdefault(split, []).extend(images)
            if others:
                reason = f"do not end in {IMAGE}, so are not read"
                rejected.append(Rejected(str(city.relative_to(root)), "file", reason, len(others)))
    found = {split: images for split, images in found.items() if images}
    if not found:
        raise DataError(f"{root}: no leftImg8bit/train/CITY/*{IMAGE} in it; name a Cityscapes folder")
    jobs: dict[str, tuple[Job, ...]] = {}
    for split, images in choose_splits(found, splits, {split: split for split in found}, root).items():
        jobs[split], missing = _pair(root, images)
        rejected += missing
    has_masks = any(isinstance(job, CityJob) and job.mask for listed in jobs.values() for job in listed)
    classes = CLASSES if has_masks else ()
    return Listing(root, classes, classes, jobs, tuple(rejected), read_sample)


def _pair(root: Path, images: list[Path]) -> tuple[tuple[Job, ...], list[Rejected]]:
    """Jobs of the images of a split, and what has no counterpart."""
    split = images[0].parent.parent.name
    folder = root / "gtFine" / split
    if not folder.is_dir():
        return tuple(CityJob(image, root, None) for image in images), []
    masks = {(city.name, _stem(path, MASK)): path for city in entries(folder) for path in _files(city, MASK)[0]}
    if not masks:
        raise DataError(f"{folder}: no CITY/*{MASK} in it; add the masks of label ids, or remove the folder")
    jobs: list[Job] = []
    rejected = []
    for image in images:
        mask = masks.pop((image.parent.name, _stem(image, IMAGE)), None)
        if mask is not None:
            jobs.append(CityJob(image, root, mask))
        else:
            wanted = folder / image.parent.name / (_stem(image, IMAGE) + MASK)
            rejected.append(Rejected(str(image.relative_to(root)), "image", f"{wanted.relative_to(root)} is missing"))
    for mask in sorted(masks.values()):
        rejected.append(Rejected(str(mask.relative_to(root)), "annotation", "its image is missing"))
    return tuple(jobs), rejected


def _files(city: Path, ending: str) -> tuple[list[Path], list[Path]]:
    """What lies in the folder of a city, in two lists: what ends in `ending`, in capitals, too, and the rest."""
    if not city.is_dir():
        return [], [city]
    lists: tuple[list[Path], list[Path]] = ([], [])
    for path in entries(city):
        lists[not path.name.lower().endswith(ending.lower())].append(path)
    return lists


def _stem(path: Path, ending: str) -> str:
    return path.name[: -len(ending)]


def read_sample(job: CityJob) -> Sample:
    """The image of a job with the train ids of its mask."""
    picture = read_picture(job.file)
    sample = Sample(*picture[:4], image_id=_stem(job.file, IMAGE))
    if job.mask is not None:
        ids = read_mask(job.mask, picture.width, picture.height)
        refuse_turned(picture, (picture.width, picture.height))
        if (wrong := ids[(ids >= NUM_LABEL_IDS) & (ids != IGNORE)]).size:
            raise DataError(
                f"{job.mask}: value {wrong[0]} is no label id (0..{NUM_LABEL_IDS - 1} and 255 are); mend the mask"
            )
        sample.semantic = encode_mask(TRAIN_IDS[ids])
    return sample
