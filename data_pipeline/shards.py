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
import shutil
import tarfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from reprlib import repr as shown
from types import TracebackType
from typing import Any, Self

import numpy as np

from cluster.files import beside
from data_pipeline.addresses import is_remote, join
from data_pipeline.cache import CachedShard, ShardCache
from data_pipeline.errors import DataError, unusable
from data_pipeline.files import Replacing, open_file
from data_pipeline.in_hand import take
from data_pipeline.manifest import BLOCK, MANIFEST, Shard, Split

IMAGE_EXTENSIONS = ("jpg", "png", "webp")
EXTENSIONS = (*IMAGE_EXTENSIONS, "json", "mask.png", "dicm")
PICKLES = ("pyd", "pickle", "pkl", "pth", "pt")  # fields that stock readers unpickle


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
    temporary = beside(target)
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
        self._file: Replacing | None = None
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
            self._file = Replacing(self.root / name)
            self._tar = webdataset.TarWriter(self._file, mtime=0, user="", group="")
        self._offsets.append(self._tar.tarstream.offset)
        self._tar.write(dict(sample))

    def finish(self) -> None:
        """Close the shard that is being written, if any; a further sample begins another."""
        if self._file is None:
            return
        self._tar.close()
        # Read before it has its name, under which another writer may put a file of its own.
        with self._file as file, file.temporary.open("rb") as written:
            digest = hashlib.file_digest(written, "sha256").hexdigest()
            size = os.fstat(written.fileno()).st_size
        self.shards.append(Shard(file.path.name, digest, size, len(self._offsets), tuple(self._offsets)))
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
        take(f"sample {sample} of {join(self.root, shard.name)}")  # until the next: it is decoded meanwhile
        start = shard.offsets[sample]
        stop = shard.offsets[sample + 1] if sample + 1 < shard.samples else shard.bytes
        data = self._read(number, start, stop - start)
        self.read_bytes += len(data)
        return parse_sample(data, f"{join(self.root, shard.name)}, sample {sample}")

    def _read(self, number: int, start: int, num_bytes: int) -> bytes:
        if self._owner != os.getpid():
            # A forked process shares the positions and the locks of files that its parent has opened.
            self._open, self._verified, self._owner = OrderedDict(), set(), os.getpid()
        with self._disk_errors(number):
            if self.cache is None:
                return os.pread(self._local_file(number).fileno(), num_bytes, start)
            copy = self._held_copy(number, self.cache)
            try:
                return os.pread(copy.fileno(), num_bytes, start)
            finally:
                copy.release()

    @contextmanager
    def _disk_errors(self, number: int) -> Iterator[None]:
        """One line for what a disk says; the file that it said it of is opened anew, and verified again."""
        try:
            yield
        except OSError as error:
            self._verified.discard(number)
            if (file := self._open.pop(number, None)) is not None:
                with suppress(OSError):
                    file.close()
            path = join(self.root, self.split.shards[number].name)
            raise unusable(error, f"{path}: cannot be read ({error.strerror}); fetch the shard again") from error

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
        file = open_file(path)
        try:
            if number not in self._verified:
                if (size := os.fstat(file.fileno()).st_size) != shard.bytes:
                    raise DataError(f"{path}: has {size} bytes instead of {shard.bytes}; fetch the shard again")
                if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
                    raise DataError(f"{path}: damaged, its sha256 is not the one in {MANIFEST}; fetch the shard again")
                self._verified.add(number)
        except BaseException:
            file.close()
            raise
        self._keep(number, file)
        return file

    def _keep(self, number: int, file: io.FileIO) -> None:
        self._open[number] = file
        if len(self._open) > self.MAX_OPEN:
            self._open.popitem(last=False)[1].close()


def parse_sample(data: bytes, where: str) -> dict[str, Any]:
    """Fields of the tar members in `data`, the bytes of one sample, and its key as "__key__".

    Headers are read one by one: `tarfile.open` would follow what members of other kinds say of their sizes, and make
    gigabytes of a sparse one, or read without end.

    Raises:
        DataError: a member that is not a regular file inside `data`, or no field of a data set.
    """
    fields: dict[str, Any] = {}
    start = 0
    while (header := data[start : start + BLOCK]).strip(b"\0"):  # zeros end an archive
        try:
            member = tarfile.TarInfo.frombuf(header, tarfile.ENCODING, "surrogateescape")
        except tarfile.HeaderError as error:
            raise DataError(f"{where}: damaged ({error}); fetch the shard again") from error
        key, _, extension = member.name.partition(".")
        start += BLOCK
        if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
            raise DataError(f"{where}: {shown(member.name)} is not a regular file; build the data set again")
        if not 0 <= member.size <= len(data) - start:
            raise DataError(f"{where}: {shown(member.name)} leaves its sample; build the data set again")
        _check_field(extension, where)
        if fields.setdefault("__key__", key) != key:
            raise DataError(f"{where}: the index in {MANIFEST} is off; build the data set again")
        fields[extension] = data[start : start + member.size]
        start += -(-member.size // BLOCK) * BLOCK
    if not fields:
        raise DataError(f"{where}: the index in {MANIFEST} is off; build the data set again")
    return fields


def facts_of(sample: dict[str, Any]) -> dict[str, Any]:
    """The JSON of a raw sample (DataError: damaged)."""
    try:
        facts = json.loads(sample.get("json", b"{}"))
    except (ValueError, RecursionError) as error:  # RecursionError: brackets without end
        raise DataError(f"its JSON is damaged ({error}); build the data set again") from error
    if not isinstance(facts, dict):
        raise DataError("its JSON is no object; build the data set again")
    return facts


def _check_field(extension: str, where: str) -> None:
    if extension in PICKLES:
        raise DataError(f"{where}: field {extension!r} is a pickle and could run code; refused, leave it out")
    if extension not in EXTENSIONS:
        raise DataError(f"{where}: field {shown(extension)} is not one of {', '.join(EXTENSIONS)}; leave it out")
