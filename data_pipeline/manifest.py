"""The manifest of a data set: its name, classes, and per split the shards with checksums and offsets of samples.

`dataset.json` adds to plain WebDataset tars what these lack: the sha256 of each shard, checked before a byte of it is
used, and the offset of every sample. It may come from a server that no one vouches for: type, form and range of every
field are checked before any is used. A damaged or foreign manifest is refused with the field and its value.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from reprlib import repr as shown
from typing import Any, Self

from data_pipeline.addresses import is_remote, join, local_folder
from data_pipeline.errors import DataError
from data_pipeline.files import Replacing, read_file

SCHEMA_VERSION = 1
MANIFEST = "dataset.json"
SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,250}\.tar")
SHA256 = re.compile(r"[0-9a-f]{64}")
BLOCK = 512  # tar pads everything to blocks of this many bytes
LARGEST_SHARD = 2**40  # bytes
MOST_MASK_CLASSES = 255  # 8-bit masks, whose value 255 is to be ignored


@dataclass(frozen=True)
class Shard:
    """One tar: file name, checksum, size in bytes, samples, byte offset of each sample's first header.

    Raises:
        DataError: a field of another type, form or range. The cache names files by `sha256`, and readers by `name`.
    """

    name: str
    sha256: str
    bytes: int
    samples: int
    offsets: tuple[int, ...]

    def __post_init__(self) -> None:
        if isinstance(self.name, str) and self.name.startswith("pipe:"):
            raise DataError(f"shard {shown(self.name)} is a pipe: address, which would run a command; refused")
        if not (isinstance(self.name, str) and SHARD_NAME.fullmatch(self.name)):
            raise DataError(f"shard name {shown(self.name)} is not a file name that ends in .tar")
        if not (isinstance(self.sha256, str) and SHA256.fullmatch(self.sha256)):
            raise self._wrong("sha256", "64 hexadecimal digits in lower case")
        # A bool is an int for isinstance, and a float compares like one.
        if type(self.bytes) is not int or not 0 < self.bytes <= LARGEST_SHARD:
            raise self._wrong("bytes", f"a whole number in 1..{LARGEST_SHARD}")
        if type(self.samples) is not int or self.samples < 1:
            raise self._wrong("samples", "a whole number of at least 1")
        if not (isinstance(self.offsets, tuple) and all(type(offset) is int for offset in self.offsets)):
            raise self._wrong("offsets", "a list of whole numbers")
        if len(self.offsets) != self.samples:
            raise DataError(f"shard {self.name!r}: {len(self.offsets)} offsets for {self.samples} samples")
        bounds = (*self.offsets, self.bytes)
        if bounds[0] != 0 or any(start % BLOCK or start >= stop for start, stop in pairwise(bounds)):
            raise self._wrong("offsets", f"0 and then rising multiples of {BLOCK} below {self.bytes} bytes")

    @classmethod
    def from_fields(cls, fields: Any) -> Self:
        """A shard from what JSON holds of it (DataError: not these fields, or one that is wrong)."""
        fields = _dict("a shard", fields)
        names = list(cls.__dataclass_fields__)
        for name in names:
            if name not in fields:
                raise DataError(f"shard {shown(fields.get('name'))} has no {name}")
        if strange := [name for name in fields if name not in names]:
            raise DataError(f"shard {shown(fields['name'])} has an unknown field {shown(strange[0])}")
        offsets = fields["offsets"]
        return cls(**{**fields, "offsets": tuple(offsets) if isinstance(offsets, list) else offsets})

    def _wrong(self, field: str, right: str) -> DataError:
        return DataError(f"shard {self.name!r}: {field}={shown(getattr(self, field))} is not {right}")


@dataclass(frozen=True)
class Split:
    """The shards of one split, in order; a sample's dataset index counts through them (shard-major)."""

    shards: tuple[Shard, ...]

    @property
    def num_samples(self) -> int:
        """Samples in all shards."""
        return sum(self.shard_sizes)

    @property
    def shard_sizes(self) -> list[int]:
        """Samples in each shard."""
        return [shard.samples for shard in self.shards]


@dataclass(frozen=True)
class Manifest:
    """What a data set holds; `dataset.json` beside the shards.

    `classes` names the values of a sample's `label` and `labels`. `semantic_classes` names the values of its semantic
    mask: value v is `semantic_classes[v]`, and 255 is to be ignored whatever the classes. Whether there is a
    background, and at which value, is thus the data set's to say. It is empty where no sample has a mask, and in
    data sets older than the field: see `mask_names`.
    """

    name: str
    classes: tuple[str, ...]
    splits: dict[str, Split]
    schema_version: int = SCHEMA_VERSION
    semantic_classes: tuple[str, ...] = ()

    @classmethod
    def load(cls, root: str | Path) -> Self:
        """Read ROOT/dataset.json; `root` is a folder or a URL.

        Raises:
            DataError: no such folder, not a data set, a damaged or newer manifest.
            StoreError: the store of a URL does not answer.
        """
        path, text = _manifest_text(root)
        try:
            fields = _dict("the manifest", json.loads(text))
            version = _required(fields, "schema_version")
            if type(version) is not int or version < 1:
                raise DataError(f"schema_version={shown(version)} is not a whole number of at least 1")
            if version <= SCHEMA_VERSION:
                return cls._from_fields(fields)
        # ValueError: no JSON, no text, or a number of thousands of digits. RecursionError: brackets without end.
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: damaged manifest ({error}); build the data set again") from error
        raise DataError(
            f"{path}: schema version {version} is newer than {SCHEMA_VERSION}, the newest that this dicm reads; update "
            "dicm"
        )

    @classmethod
    def _from_fields(cls, fields: dict[str, Any]) -> Self:
        name = _required(fields, "name")
        if not isinstance(name, str):
            raise DataError(f"name={shown(name)} is not text")
        splits = {}
        for split, content in _dict("splits", _required(fields, "splits")).items():
            shards = _required(_dict(f"splits.{split}", content), "shards")
            if not isinstance(shards, list):
                raise DataError(f"splits.{split}.shards={shown(shards)} is not a list")
            splits[split] = Split(tuple(map(Shard.from_fields, shards)))
        semantic = _names("semantic_classes", fields.get("semantic_classes", []))
        if len(semantic) > MOST_MASK_CLASSES:
            raise DataError(f"semantic_classes has {len(semantic)} names, masks hold {MOST_MASK_CLASSES} at most")
        classes = _names("classes", _required(fields, "classes"))
        return cls(name, classes, splits, fields["schema_version"], semantic)

    def save(self, root: str | Path) -> None:
        """Write ROOT/dataset.json, whole or not at all."""
        with Replacing(Path(root) / MANIFEST) as file:
            file.write(self._json().encode())

    def split(self, name: str) -> Split:
        """The split `name`; DataError with the splits there are."""
        if name not in self.splits:
            raise DataError(f"{self.name}: no split {name!r}; it has {', '.join(self.splits) or 'none'}")
        return self.splits[name]

    @property
    def mask_names(self) -> tuple[str, ...]:
        """Names of the values of semantic masks, by value.

        Data sets older than `semantic_classes` have 0 as background and k + 1 as class k.
        """
        return self.semantic_classes or ("background", *self.classes)

    @cached_property
    def hash(self) -> str:
        """sha256 of the manifest: changes with any sample, its order or the classes."""
        return hashlib.sha256(self._json().encode()).hexdigest()

    def _json(self) -> str:
        fields = asdict(self)
        if not self.semantic_classes:  # so that the hash of a data set older than the field stays what it was
            del fields["semantic_classes"]
        return json.dumps(fields, separators=(",", ":"), sort_keys=True)


def _manifest_text(root: str | Path) -> tuple[str, bytes]:
    """Address and content of the manifest of `root`."""
    path = join(root, MANIFEST)
    if is_remote(root):
        from data_pipeline.storage import Retries, read  # imports fsspec

        try:
            return path, read(path, Retries())
        except FileNotFoundError as error:
            raise DataError(
                f"{root}: not a data set (no {MANIFEST} there); upload the folder that `dicm data build` wrote"
            ) from error
    folder = local_folder(root)
    if not folder.is_dir():
        raise DataError(f"{root}: no such folder; make a data set with `dicm data build` or `dicm data scenes`")
    if not (folder / MANIFEST).is_file():
        raise DataError(
            f"{root}: not a data set (no {MANIFEST}); make one of your images with "
            f"`dicm data build imagefolder {root} OUT`"
        )
    try:
        return path, read_file(folder / MANIFEST)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); mend its permissions") from error


def _required(fields: dict[str, Any], key: str) -> Any:
    if key not in fields:
        raise DataError(f"{key} is missing")
    return fields[key]


def _dict(what: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{what} is {shown(value)}, not a set of named fields")
    return value


def _names(key: str, value: Any) -> tuple[str, ...]:
    if not (isinstance(value, list) and all(isinstance(name, str) for name in value)):
        raise DataError(f"{key}={shown(value)} is not a list of texts")
    return tuple(value)
