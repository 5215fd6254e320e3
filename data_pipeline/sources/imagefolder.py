"""Folders of images: SRC/train/CLASS/*, SRC/val/CLASS/*; also SRC/CLASS/*, and images without classes.

A class is a folder's name; classes are numbered in the order of these, and one without an image keeps its number.
`classes.json` ({folder: readable name}) in SRC gives names for people. Links are followed. Names that begin with a dot
are not looked at; what else is not read is listed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from data_pipeline.errors import DataError
from data_pipeline.files import read_file
from data_pipeline.folders import IMAGE_SUFFIXES, Files, entries, files_below, is_image
from data_pipeline.sources.listing import Job, Listing, Rejected, Sample, choose_splits, unread
from data_pipeline.sources.reading import read_picture

SPLITS = ("train", "val", "test")
NAMES = "classes.json"


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
    top = _look(root, but=NAMES)
    folders = {split: root / split for split in SPLITS if top.images(split)}
    if folders and (others := [name for name in top.folders if name not in folders and top.images(name)]):
        raise DataError(
            f"{root}: {', '.join(folders)} beside other folders of images ({', '.join(others[:3])}); "
            "move these into the split they belong to, or rename what is not a split"
        )
    found = {split: _look(folder) for split, folder in folders.items()} or {"train": top}
    names = list(found["train"].folders) if "train" in found and found["train"].is_labelled else []
    names = names or sorted({name for look in found.values() if look.is_labelled for name in look.folders})
    numbers = {name: number for number, name in enumerate(names)}
    jobs: dict[str, tuple[Job, ...]] = {}
    for split, look in found.items():
        if unknown := [name for name in look.folders if name not in numbers and look.images(name)]:
            raise DataError(
                f"{root}/{split}: class folders {', '.join(unknown[:3])} are not in {root}/train; "
                "sort its images into the classes of train, or move them away"
            )
        if look.is_labelled:
            jobs[split] = tuple(
                ImageJob(path, root, numbers[name]) for name in look.folders for path in look.images(name)
            )
        elif look.loose:
            jobs[split] = tuple(ImageJob(path, root, None) for path in look.loose)
    if not jobs:
        raise DataError(f"{root}: no image in it; images end in {', '.join(IMAGE_SUFFIXES)}")
    readable = _readable_names(root)
    return Listing(
        root=root,
        classes=tuple(readable.get(name, name) for name in names),
        semantic_classes=(),
        splits=choose_splits(jobs, splits, {split: split for split in jobs}, root),
        rejected=tuple(_left_out(top, found)),
        read=read_sample,
    )


def read_sample(job: ImageJob) -> Sample:
    """The image of a job with its label."""
    picture = read_picture(job.file)
    return Sample(*picture[:4], label=job.label, image_id=job.file.stem)


@dataclass(frozen=True)
class _Look:
    """What a folder of classes holds: the files below each folder in it, by name, and those beside them."""

    root: Path
    folders: dict[str, Files]
    files: Files

    def images(self, name: str) -> list[Path]:
        """Images somewhere below a folder."""
        return [path for path in self.folders[name].paths if is_image(path)] if name in self.folders else []

    @property
    def loose(self) -> list[Path]:
        """Images beside the folders."""
        return [path for path in self.files.paths if is_image(path)]

    @cached_property
    def is_labelled(self) -> bool:
        """Whether there is an image in any folder."""
        return any(self.images(name) for name in self.folders)


def _look(root: Path, but: str = "") -> _Look:
    folders: dict[str, Files] = {}
    files = Files([], {})
    for path in entries(root):
        if path.is_dir():
            folders[path.name] = files_below(path)
        elif path.is_file():
            if path.name != but:
                files.paths.append(path)
        else:
            files.others[path] = "a link to nothing" if path.is_symlink() else "neither a file nor a folder"
    return _Look(root, folders, files)


def _left_out(top: _Look, found: Mapping[str, _Look]) -> Iterator[Rejected]:
    """What the source folder `top` and the splits `found` in it hold that is not in the data set."""
    root = top.root
    if all(look is not top for look in found.values()):
        yield from _strays(top, root)
        for name in top.folders:
            if name not in found:
                yield from unread(root / name, top.folders[name], root)
    for split, look in found.items():
        if look.is_labelled:
            yield from _strays(look, root)
        else:
            yield from unread(look.root, look.files, root)
        for name, files in look.folders.items():
            yield from unread(look.root / name, files, root)
            if look.is_labelled and split == "train" and not look.images(name):
                reason = "holds no image that is read, so the class has none"
                yield Rejected(str((look.root / name).relative_to(root)), "class", reason)


def _strays(look: _Look, root: Path) -> Iterator[Rejected]:
    """The files beside folders of images."""
    for path in look.loose:
        yield Rejected(str(path.relative_to(root)), "image", "lies beside the class folders, so it has no class")
    yield from unread(look.root, look.files, root)


def _readable_names(root: Path) -> dict[str, str]:
    path = root / NAMES
    if not path.is_file():
        return {}
    try:
        names = dict(json.loads(read_file(path)).items())
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, AttributeError) as error:
        raise DataError(
            f"{path}: not a JSON object of folder names and class names ({error}); mend or remove it"
        ) from error
    for folder, name in names.items():
        if not isinstance(name, str):
            raise DataError(f"{path}: the name of {folder!r} is {name!r}, no text; mend it")
    return names
