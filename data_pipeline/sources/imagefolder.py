"""Folders of images: SRC/train/CLASS/*, SRC/val/CLASS/*; also SRC/CLASS/*, and images without classes.

A class is a folder's name; classes are numbered in the order of these. `classes.json` ({folder: readable name})
in SRC gives names for people. Names that begin with a dot are not looked at.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.errors import DataError

SUFFIXES = {".jpg": "jpg", ".jpeg": "jpg", ".png": "png", ".webp": "webp"}
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Listing:
    """Files of one split, in a fixed order, each with its class or None."""

    split: str
    files: tuple[tuple[Path, int | None], ...]


@dataclass(frozen=True)
class ImageFolder:
    """What a folder holds: class names, the files of each split, and images outside every class folder."""

    classes: tuple[str, ...]
    listings: tuple[Listing, ...]
    strays: tuple[Path, ...]


def list_images(source: Path) -> ImageFolder:
    """Class names and the files of each split of an image folder.

    A split without any class folder is unlabelled. In a split with class folders, an image beside them has no
    class: it is a stray.

    Raises:
        DataError: no such folder, no image in it, splits beside class folders, or classes that train lacks.
    """
    if not source.is_dir():
        raise DataError(f"{source}: no such folder; name one that holds images")
    top = _classes(source)
    splits = {split: source / split for split in SPLITS if split in top.folders}
    if splits and (others := sorted(set(top.folders) - set(splits))):
        raise DataError(
            f"{source}: {', '.join(splits)} beside other folders of images ({', '.join(others[:3])}); "
            "move these into the split they belong to, or rename what is not a split"
        )
    found = {split: _classes(root) for split, root in splits.items()} or {"train": top}
    names = list(found["train"].folders) if "train" in found else []
    names = names or sorted({name for classes in found.values() for name in classes.folders})
    numbers = {name: number for number, name in enumerate(names)}
    listings, strays = [], list(top.loose) if splits else []
    for split, classes in found.items():
        if unknown := [name for name in classes.folders if name not in numbers]:
            raise DataError(
                f"{source}/{split}: class folders {', '.join(unknown[:3])} are not in {source}/train; "
                "sort its images into the classes of train, or move them away"
            )
        files: list[tuple[Path, int | None]] = [
            (path, numbers[name]) for name, paths in classes.folders.items() for path in paths
        ]
        if files:
            strays += classes.loose
        else:
            files = [(path, None) for path in classes.loose]
        if files:
            listings.append(Listing(split, tuple(files)))
    if not listings:
        raise DataError(f"{source}: no image in it; images end in {', '.join(SUFFIXES)}")
    readable = _readable_names(source)
    return ImageFolder(tuple(readable.get(name, name) for name in names), tuple(listings), tuple(strays))


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


def _readable_names(source: Path) -> dict[str, str]:
    path = source / "classes.json"
    if not path.is_file():
        return {}
    try:
        return {str(key): str(value) for key, value in json.loads(path.read_text()).items()}
    except (ValueError, AttributeError) as error:
        raise DataError(
            f"{path}: not a JSON object of folder names and class names ({error}); mend or remove it"
        ) from error
