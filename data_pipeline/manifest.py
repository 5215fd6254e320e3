"""The manifest of a data set: its name, classes, and per split the shards with checksums and offsets of samples.

`dataset.json` adds to plain WebDataset tars what these lack: the sha256 of each shard, checked before a byte of it is
used, and the offset of every sample. A damaged or foreign one is refused with the field.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

from data_pipeline.addresses import is_remote, join, local_folder
from data_pipeline.errors import DataError
from data_pipeline.files import Replacing

SCHEMA_VERSION = 1
MANIFEST = "dataset.json"
SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.tar")
BLOCK = 512  # tar pads everything to blocks of this many bytes


@dataclass(frozen=True)
class Shard:
    """One tar: file name, checksum, size in bytes, samples, byte offset of each sample's first header."""

    name: str
    sha256: str
    bytes: int
    samples: int
    offsets: tuple[int, ...]


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
            fields = json.loads(text)
            version = fields["schema_version"]
            if version > SCHEMA_VERSION:
                raise DataError(
                    f"{path}: schema version {version} is newer than {SCHEMA_VERSION}, the newest that this "
                    "dicm reads; update dicm"
                )
            splits = {
                name: Split(tuple(_shard(shard, path) for shard in split["shards"]))
                for name, split in fields["splits"].items()
            }
            semantic = tuple(fields.get("semantic_classes", ()))
            return cls(fields["name"], tuple(fields["classes"]), splits, version, semantic)
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path}: damaged manifest ({error}); build the data set again") from error

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
        return path, (folder / MANIFEST).read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); mend its permissions") from error


def _shard(fields: dict[str, Any], path: str) -> Shard:
    """A shard's entry, checked as far as that goes without its bytes."""
    shard = Shard(**{**fields, "offsets": tuple(fields["offsets"])})
    if shard.name.startswith("pipe:"):
        raise DataError(f"{path}: shard {shard.name!r} is a pipe: address, which would run a command; refused")
    bounds = (*shard.offsets, shard.bytes)
    if (
        not SHARD_NAME.fullmatch(shard.name)
        or not len(shard.offsets) == shard.samples > 0
        or shard.offsets[0] != 0
        or any(start % BLOCK or start >= stop for start, stop in pairwise(bounds))
    ):
        raise DataError(f"{path}: damaged entry of shard {shard.name!r}; build the data set again")
    return shard
