"""Folders of images: SRC/train/CLASS/*, SRC/val/CLASS/*; also SRC/CLASS/*, and images without classes.

A class is a folder's name; classes are numbered in the order of these. `classes.json` ({folder: readable name})
in SRC gives names for people. Names that begin with a dot are not looked at.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.errors import DataError
from data_pipeline.sources.listing import Job, Listing, Rejected, Sample, choose_splits
from data_pipeline.sources.reading import SUFFIXES, read_picture

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class ImageJob(Job):
    """An image and its class, or None."""

    label: int | None


def list_source(root: Path, splits: Mapping[str, str] | None = None) -> Listing:
    """Class names and the files of each split of an image folder.

    A split without any class folder is unlabelled. In a split with class folders, an image beside them has no
    class: it is left out.

    Raises:
        DataError: no image in it, splits beside class folders, or classes that train lacks.
    """
    top = _classes(root)
    folders = {split: root / split for split in SPLITS if split in top.folders}
    if folders and (others := sorted(set(top.folders) - set(folders))):
        raise DataError(
            f"{root}: {', '.join(folders)} beside other folders of images ({', '.join(others[:3])}); "
            "move these into the split they belong to, or rename what is not a split"
        )
    found = {split: _classes(folder) for split, folder in folders.items()} or {"train": top}
    names = list(found["train"].folders) if "train" in found else []
    names = names or sorted({name for classes in found.values() for name in classes.folders})
    numbers = {name: number for number, name in enumerate(names)}
    jobs: dict[str, tuple[Job, ...]] = {}
    strays = list(top.loose) if folders else []
    for split, classes in found.items():
        if unknown := [name for name in classes.folders if name not in numbers]:
            raise DataError(
                f"{root}/{split}: class folders {', '.join(unknown[:3])} are not in {root}/train; "
                "sort its images into the classes of train, or move them away"
            )
        if classes.folders:
            strays += classes.loose
            jobs[split] = tuple(
                ImageJob(path, root, numbers[name]) for name, paths in classes.folders.items() for path in paths
            )
        elif classes.loose:
            jobs[split] = tuple(ImageJob(path, root, None) for path in classes.loose)
    if not jobs:
        raise DataError(f"{root}: no image in it; images end in {', '.join(SUFFIXES)}")
    readable = _readable_names(root)
    return Listing(
        root=root,
        classes=tuple(readable.get(name, name) for name in names),
        semantic_classes=(),
        splits=choose_splits(jobs, splits, {split: split for split in jobs}, root),
        rejected=tuple(
            Rejected(str(path.relative_to(root)), "image", "lies beside the class folders, so it has no class")
            for path in strays
        ),
        read=read_sample,
    )


def read_sample(job: ImageJob) -> Sample:
    """The image of a job with its label."""
    picture = read_picture(job.file)
    return Sample(*picture, label=job.label, image_id=job.file.stem)


@dataclass(frozen=True)
class _Classes:
    folders: dict[str, list[Path]]  # by name, sorted; only those with images somewhere below
    loose: list[Path]


def _classes(root: Path) -> _Classes:
    folders: dict[str, list[Path]] = {}
    loose: list[Path] = []
    for path in sorted(path for path in root.iterdir() if not path.name.startswith(".")):
        if path.is_dir():
            if images := _images(path):
                folders[path.name] = images
        elif path.suffix.lower() in SUFFIXES:
            loose.append(path)
    return _Classes(folders, loose)


def _images(folder: Path) -> list[Path]:
    images = []
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        images += [Path(place, name) for name in files if not name.startswith(".")]
    return sorted(path for path in images if path.suffix.lower() in SUFFIXES)


def _readable_names(root: Path) -> dict[str, str]:
    path = root / "classes.json"
    if not path.is_file():
        return {}
    try:
        return {str(key): str(value) for key, value in json.loads(path.read_text()).items()}
    except (ValueError, AttributeError) as error:
        raise DataError(
            f"{path}: not a JSON object of folder names and class names ({error}); mend or remove it"
        ) from error
