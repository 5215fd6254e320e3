"""Files below a folder, none of them passed over in silence: what `dicm encode`, `predict` and `data build` list.

Links are followed; a folder that cannot be listed raises OSError with its name, where `glob` and `os.walk` go on
without it. Names that begin with a dot are not looked at.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp")  # in capitals, too
OTHER_IMAGE_SUFFIXES = (".avif", ".bmp", ".gif", ".heic", ".heif", ".jp2", ".jxl", ".tif", ".tiff")


class Files(NamedTuple):
    """Regular files in alphabetical order, and what is neither a file nor a folder, each with what it is."""

    paths: list[Path]
    others: dict[Path, str]


def is_image(path: Path) -> bool:
    """Whether a file's name says that it is an image of a format that is read."""
    return path.suffix.lower() in IMAGE_SUFFIXES


def entries(folder: Path) -> list[Path]:
    """What lies in a folder, in alphabetical order; nothing where there is no such folder.

    Raises:
        OSError: it cannot be listed.
    """
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except FileNotFoundError:
        return []


def files_below(folder: Path) -> Files:
    """The files in a folder and in all folders below it; one that is linked into itself is looked at once.

    Raises:
        OSError: one of the folders cannot be listed.
    """
    paths: list[Path] = []
    others: dict[Path, str] = {}

    def visit(place: Path, above: frozenset[tuple[int, int]]) -> None:
        identity = _identity(place)
        if identity in above:
            others[place] = "a link to a folder that it lies in"
            return
        with os.scandir(place) as found:
            listed = [entry for entry in found if not entry.name.startswith(".")]
        for entry in listed:  # its kind comes from the listing: a file that is no link costs no further call
            path = place / entry.name
            if entry.is_dir():
                visit(path, above | {identity})
            elif entry.is_file():
                paths.append(path)
            else:
                others[path] = "a link to nothing" if entry.is_symlink() else "neither a file nor a folder"

    visit(folder, frozenset(map(_identity, folder.absolute().parents)))
    return Files(sorted(paths), dict(sorted(others.items())))


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino
