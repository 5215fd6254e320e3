"""Shards on disk: WebDataset tars with an index and a checksum for each, listed in one manifest.

    DATASET/
      dataset.json            Manifest: name, classes, and per split the shards
      train-000000.tar        KEY.jpg KEY.json [KEY.mask.png] KEY.jpg ...
      val-000000.tar

The tars are plain WebDataset: `webdataset.WebDataset` reads them. The manifest adds what it lacks: the sha256
of each shard, checked before a byte of it is used, and the offset of every sample, so that any sample is read
by itself and order is free of the layout on disk. Files are written under a temporary name and renamed; tar
headers carry no time and no owner, so equal input gives equal bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import tarfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from data_pipeline.addresses import is_remote, join, local_folder
from data_pipeline.cache import CachedShard, ShardCache
from data_pipeline.errors import DataError

SCHEMA_VERSION = 1
MANIFEST = "dataset.json"
IMAGE_EXTENSIONS = ("jpg", "png", "webp")
EXTENSIONS = (*IMAGE_EXTENSIONS, "json", "mask.png", "dicm")
PICKLES = ("pyd", "pickle", "pkl", "pth", "pt")  # fields that stock readers unpickle
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
        with _Replacing(Path(root) / MANIFEST) as file:
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


class _Replacing(io.FileIO):
    """A file that appears under its name when the `with` block ends well, and not at all otherwise."""

    def __init__(self, path: Path):
        self.path, self.temporary = path, path.with_name(f".{path.name}.{os.getpid()}")
        super().__init__(self.temporary, "wb")

    def __exit__(self, kind: type[BaseException] | None, value: Any, traceback: Any) -> None:
        if kind is None:
            self.flush()
            os.fsync(self.fileno())
        self.close()
        if kind is None:
            os.replace(self.temporary, self.path)
        else:
            self.temporary.unlink(missing_ok=True)


def refuse_existing(out: Path) -> None:
    """DataError where `out` is there already and is not an empty folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out}: is there already; name a new folder or remove it")


@contextmanager
def new_dataset(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out` that becomes `out` when the block ends well, and is removed otherwise.

    Raises:
        DataError: `out` holds something already, or cannot be written.
    """
    target = Path(os.path.abspath(out))
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        refuse_existing(out)
        temporary.mkdir(parents=True)
        yield temporary
        os.replace(temporary, target)
    except OSError as error:
        raise DataError(
            f"{out}: cannot be written ({error.strerror or error}); free space or name another folder"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class ShardWriter:
    """Writes the samples of one split into shards; a context manager.

    A shard is closed when it holds `max_samples` samples or `max_bytes` bytes: it is what a cache fetches and
    a process verifies at once, so it should neither be tiny nor take minutes. `shards` holds the finished ones
    once the block has ended. With `finished`, shards that an earlier writer of the same split left, it goes on
    behind them.
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        *,
        max_samples: int = 1000,
        max_bytes: int = 256 * 2**20,
        finished: Sequence[Shard] = (),
    ):
        self.root, self.split, self.max_samples, self.max_bytes = Path(root), split, max_samples, max_bytes
        self.shards: list[Shard] = list(finished)
        self._file: _Replacing | None = None
        self._tar: Any = None
        self._offsets: list[int] = []

    def write(self, sample: Mapping[str, Any]) -> None:
        """Add {"__key__": str, "jpg" | "png" | "webp": bytes, "json": dict, "mask.png": bytes}.

        Raises:
            DataError: a field of another name; pickles above all have no place in a data set.
        """
        for extension in sample:
            if extension != "__key__":
                _check_field(extension, str(sample["__key__"]))
        if len(self._offsets) == self.max_samples or (
            self._file is not None and self._tar.tarstream.offset >= self.max_bytes
        ):
            self.finish()
        if self._file is None:
            import webdataset  # imports torch, which readers and refusals should not wait for

            name = f"{self.split}-{len(self.shards):06d}.tar"
            self._file = _Replacing(self.root / name)
            self._tar = webdataset.TarWriter(self._file, mtime=0, user="", group="")
        self._offsets.append(self._tar.tarstream.offset)
        self._tar.write(dict(sample))

    def finish(self) -> None:
        """Close the shard that is being written, if any; a further sample begins another."""
        if self._file is None:
            return
        self._tar.close()
        with self._file as file:
            path = file.path
        with path.open("rb") as written:
            digest = hashlib.file_digest(written, "sha256").hexdigest()
        self.shards.append(Shard(path.name, digest, path.stat().st_size, len(self._offsets), tuple(self._offsets)))
        self._file, self._offsets = None, []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish()
        elif self._file is not None:
            # Closed here, or the tar's stream would complain when it is collected.
            with suppress(OSError):
                self._tar.tarstream.fileobj.close()
            self._file.__exit__(kind, value, traceback)


class ShardReader:
    """Random access to the samples of a split; opens files lazily, so it travels to worker processes.

    A shard's size and sha256 are checked once in each process, before its first byte is used. Shards of a folder are
    read where they are, those of a URL through `cache`. For one thread of a process.

    Args:
        root: folder or URL of the data set.
        cache: of remote shards; one in the default place if not given.

    Attributes:
        read_bytes: bytes of samples that this object has read.
    """

    MAX_OPEN = 32

    def __init__(self, root: str | Path, split: Split, cache: ShardCache | None = None):
        self.root, self.split, self.read_bytes = root, split, 0
        self.cache = (cache or ShardCache()) if is_remote(root) else None
        self._starts = np.concatenate([[0], np.cumsum(split.shard_sizes)])
        self._open: OrderedDict[int, io.FileIO] = OrderedDict()
        self._verified: set[int] = set()
        self._owner = os.getpid()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict(), "_verified": set(), "read_bytes": 0}

    def locate(self, index: int) -> tuple[int, int]:
        """(shard, sample in it) of dataset index `index`."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        return shard, index - int(self._starts[shard])

    def shards_of(self, indexes: Sequence[int]) -> list[int]:
        """Numbers of the shards that hold the samples `indexes`, each once, in order of first use."""
        numbers = np.searchsorted(self._starts, np.asarray(indexes), side="right") - 1
        return list(dict.fromkeys(numbers.tolist()))

    def read(self, index: int) -> dict[str, Any]:
        """Fields of sample `index` by extension, as bytes, and its key as "__key__".

        Raises:
            DataError: the sample's shard is missing or is not what the manifest lists.
        """
        number, sample = self.locate(index)
        shard = self.split.shards[number]
        start = shard.offsets[sample]
        stop = shard.offsets[sample + 1] if sample + 1 < shard.samples else shard.bytes
        data = self._read(number, start, stop - start)
        self.read_bytes += len(data)
        return parse_sample(data, f"{join(self.root, shard.name)}, sample {sample}")

    def _read(self, number: int, start: int, num_bytes: int) -> bytes:
        if self._owner != os.getpid():
            # A forked process shares the positions and the locks of files that its parent has opened.
            self._open, self._verified, self._owner = OrderedDict(), set(), os.getpid()
        if self.cache is None:
            return os.pread(self._local_file(number).fileno(), num_bytes, start)
        copy = self._held_copy(number, self.cache)
        try:
            return os.pread(copy.fileno(), num_bytes, start)
        finally:
            copy.release()

    def _held_copy(self, number: int, cache: ShardCache) -> CachedShard:
        copy = self._open.get(number)
        if isinstance(copy, CachedShard):
            if copy.hold():
                self._open.move_to_end(number)
                return copy
            self._open.pop(number).close()
        copy = cache.open(self.root, self.split.shards[number])
        self._keep(number, copy)
        return copy

    def _local_file(self, number: int) -> io.FileIO:
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        shard = self.split.shards[number]
        path = Path(join(self.root, shard.name))
        try:
            file = io.FileIO(path)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}); fetch the shard again") from error
        if number not in self._verified:
            if (size := os.fstat(file.fileno()).st_size) != shard.bytes:
                file.close()
                raise DataError(f"{path}: has {size} bytes instead of {shard.bytes}; fetch the shard again")
            if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
                file.close()
                raise DataError(f"{path}: damaged, its sha256 is not the one in {MANIFEST}; fetch the shard again")
            self._verified.add(number)
        self._keep(number, file)
        return file

    def _keep(self, number: int, file: io.FileIO) -> None:
        self._open[number] = file
        if len(self._open) > self.MAX_OPEN:
            self._open.popitem(last=False)[1].close()


def parse_sample(data: bytes, where: str) -> dict[str, Any]:
    """Fields of the tar members in `data`, the bytes of one sample, and its key as "__key__"."""
    fields: dict[str, Any] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                _check_field(extension, where)
                content = tar.extractfile(member)
                if content is None:
                    raise DataError(f"{where}: {member.name} is not a plain file; build the data set again")
                if fields.setdefault("__key__", key) != key:
                    raise DataError(f"{where}: the index in {MANIFEST} is off; build the data set again")
                fields[extension] = content.read()
    except tarfile.TarError as error:
        raise DataError(f"{where}: damaged ({error}); fetch the shard again") from error
    return fields


def _check_field(extension: str, where: str) -> None:
    if extension in PICKLES:
        raise DataError(f"{where}: field {extension!r} is a pickle and could run code; refused, leave it out")
    if extension not in EXTENSIONS:
        raise DataError(f"{where}: field {extension!r} is not one of {', '.join(EXTENSIONS)}; leave it out")
