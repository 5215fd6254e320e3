"""Folders of images: SRC/train/CLASS/*, SRC/val/CLASS/*; also SRC/CLASS/* and loose images without classes.

A class is a folder's name; `classes.json` ({folder: readable name}) beside the splits gives names for people.
"""

from __future__ import annotations

import json
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


def list_images(source: Path) -> tuple[tuple[str, ...], list[Listing]]:
    """Class names and the files of each split of an image folder.

    Raises:
        DataError: no such folder, no image in it, or splits with other classes.
    """
    if not source.is_dir():
        raise DataError(f"{source}: no such folder; name one that holds images")
    roots = {split: source / split for split in SPLITS if (source / split).is_dir()} or {"train": source}
    folders = sorted({folder.name for root in roots.values() for folder in _class_folders(root)})
    classes = {name: number for number, name in enumerate(folders)}
    listings = []
    for split, root in roots.items():
        files: list[tuple[Path, int | None]] = []
        if folders:
            for folder in _class_folders(root):
                files += [(path, classes[folder.name]) for path in _images(folder)]
        else:
            files = [(path, None) for path in _images(root)]
        if files:
            listings.append(Listing(split, tuple(files)))
    if not listings:
        raise DataError(f"{source}: no image in it; images end in {', '.join(SUFFIXES)}")
    return tuple(_names(source).get(name, name) for name in folders), listings


def _class_folders(root: Path) -> list[Path]:
    return sorted(folder for folder in root.iterdir() if folder.is_dir() and _images(folder))


def _images(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())


def _names(source: Path) -> dict[str, str]:
    path = source / "classes.json"
    if not path.is_file():
        return {}
    try:
        return {str(key): str(value) for key, value in json.loads(path.read_text()).items()}
    except (ValueError, AttributeError) as error:
        raise DataError(f"{path}: not a JSON object of folder names and class names ({error}); mend or remove it") from error
