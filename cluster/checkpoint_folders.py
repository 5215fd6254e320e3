"""Where checkpoints lie: a folder of a file system, or of a store that fsspec reaches.

Both promise the same in their own way: what `steps` lists was once complete. A file system has renames, so a step is
written beside and renamed; a store has none, but an object is there whole or not at all, so its manifest, written last,
makes a step complete.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from cluster.files import beside, write_whole

STATE, MANIFEST = "state.pt", "manifest.json"
LEFTOVER_SECONDS = 6 * 3600.0  # after which a write to a store that was not completed is a dead writer's
NAME = re.compile(r"step_(\d{8,})")

Signature = tuple[Any, ...] | None  # changes whenever a file of the step does; None: not known
Writer = Callable[[BinaryIO], None]


class CheckpointFolder(Protocol):
    """Folders step_NNNNNNNN, each with a state and a manifest."""

    name: str

    def steps(self) -> list[int]:
        """Steps that have a folder, ascending; whole or damaged."""

    def write(self, step: int, write_state: Writer, manifest_of: Callable[[int, str], bytes]) -> None:
        """Write a step; `manifest_of(bytes, sha256)` of its state is the manifest's content."""

    def rewrite_manifest(self, step: int, manifest: bytes) -> None:
        """Replace the manifest of a step that is there."""

    def read(self, step: int, file: str) -> BinaryIO:
        """Open a file of a step, seekable (OSError)."""

    def size(self, step: int, file: str) -> int:
        """Bytes of a file of a step (OSError)."""

    def signature(self, step: int) -> Signature:
        """Changes with the step's files."""

    def remove(self, step: int) -> None:
        """Drop a step (OSError, or a store library's own error)."""

    def remove_leftovers(self) -> None:
        """Drop what a writer that died has left (OSError, or a store library's own error)."""


def step_name(step: int) -> str:
    """Name of the folder of a step."""
    return f"step_{step:08d}"


def open_folder(where: Path | str) -> CheckpointFolder:
    """The folder at a path or URL."""
    if "://" in str(where) and not str(where).startswith("file://"):
        return StoreFolder(str(where))
    return LocalFolder(Path(str(where).removeprefix("file://")))


class LocalFolder:
    """A folder of a mounted file system; a network's serves all nodes."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.name = folder, str(folder)

    def steps(self) -> list[int]:
        """Steps that have a folder (OSError: the storage does not say, which is not to be taken for none)."""
        try:
            names = os.listdir(self.folder)
        except FileNotFoundError:
            return []
        return sorted(int(match[1]) for name in names if (match := NAME.fullmatch(name)))

    def write(self, step: int, write_state: Writer, manifest_of: Callable[[int, str], bytes]) -> None:
        """Beside, synced, then renamed."""
        final = self.path(step)
        temporary = beside(final)
        self.remove_leftovers()
        try:
            temporary.mkdir(parents=True)
            with HashedFile((temporary / STATE).open("wb")) as file:
                file.written_by(write_state)
                os.fsync(file.file.fileno())
            write_whole(temporary / MANIFEST, manifest_of(file.bytes, file.sha256))
            _sync_folder(temporary)
            if final.exists():
                # Out of the way by a rename, which is short: only between the two is the step absent.
                os.replace(final, beside(final))
            os.replace(temporary, final)
            _sync_folder(self.folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        self.remove_leftovers()

    def rewrite_manifest(self, step: int, manifest: bytes) -> None:
        """At once, by a rename."""
        write_whole(self.path(step) / MANIFEST, manifest)

    def read(self, step: int, file: str) -> BinaryIO:
        """The file itself."""
        return (self.path(step) / file).open("rb")

    def size(self, step: int, file: str) -> int:
        """As the file system says."""
        return (self.path(step) / file).stat().st_size

    def signature(self, step: int) -> Signature:
        """Inode, size and time of both files."""
        try:
            stats = [(self.path(step) / name).stat() for name in (STATE, MANIFEST)]
        except OSError:
            return None
        return tuple((stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in stats)

    def remove(self, step: int) -> None:
        """The folder with all that is in it."""
        with suppress(FileNotFoundError):
            shutil.rmtree(self.path(step))

    def path(self, step: int) -> Path:
        """The folder of a step."""
        return self.folder / step_name(step)

    def remove_leftovers(self) -> None:
        """Folders under a temporary name."""
        for path in self.folder.glob(".step_*") if self.folder.is_dir() else []:
            shutil.rmtree(path, ignore_errors=True)


class StoreFolder:
    """A prefix in a store: s3://, gs://, memory:// and whatever else fsspec knows."""

    def __init__(self, url: str) -> None:
        from fsspec.core import url_to_fs

        self.name = url.rstrip("/")
        self.files, root = url_to_fs(self.name)
        self.root = root.rstrip("/")
        # Rank 0 reads a state to verify it and once more to load it: it is kept in between.
        self._fetched: tuple[int, Signature, bytes] | None = None

    def steps(self) -> list[int]:
        """Steps with a manifest: it is written last."""
        self.files.invalidate_cache()
        try:
            paths = self.files.ls(self.root, detail=False)
        except FileNotFoundError:
            return []
        matches = (NAME.fullmatch(str(path).rstrip("/").rpartition("/")[2]) for path in paths)
        steps = sorted(int(match[1]) for match in matches if match)
        return [step for step in steps if self.files.exists(self._path(step, MANIFEST))]

    def write(self, step: int, write_state: Writer, manifest_of: Callable[[int, str], bytes]) -> None:
        """The state, then the manifest."""
        self._fetched = None
        if self.files.exists(self._path(step, MANIFEST)):
            self.files.rm_file(self._path(step, MANIFEST))
        with HashedFile(self.files.open(self._path(step, STATE), "wb")) as file:
            file.written_by(write_state)
        self.files.pipe_file(self._path(step, MANIFEST), manifest_of(file.bytes, file.sha256))

    def rewrite_manifest(self, step: int, manifest: bytes) -> None:
        """An object is replaced as a whole."""
        self.files.pipe_file(self._path(step, MANIFEST), manifest)

    def read(self, step: int, file: str) -> BinaryIO:
        """The object's bytes; a state that was just read is not fetched again."""
        if file != STATE:
            return io.BytesIO(self.files.cat_file(self._path(step, file)))
        signature = self.signature(step)
        if self._fetched is None or self._fetched[:2] != (step, signature):
            self._fetched = (step, signature, self.files.cat_file(self._path(step, STATE)))
        return io.BytesIO(self._fetched[2])

    def size(self, step: int, file: str) -> int:
        """As the store says."""
        return int(self._info(step, file)["size"])

    def signature(self, step: int) -> Signature:
        """Size and the store's tag or time of both objects."""
        try:
            facts = [self._info(step, name) for name in (STATE, MANIFEST)]
        except Exception:  # the stores' libraries share no class of their own; reading says what is the matter
            return None
        return tuple(
            (fact["size"], str(fact.get("ETag") or fact.get("LastModified") or fact.get("created"))) for fact in facts
        )

    def remove(self, step: int) -> None:
        """The manifest first: without it the step is no more."""
        for name in (MANIFEST, STATE):
            if self.files.exists(self._path(step, name)):
                self.files.rm_file(self._path(step, name))

    def remove_leftovers(self) -> None:
        """States without a manifest, and uploads that were never completed, once they are old.

        Young ones may belong to a writer that still lives, though this process has been started in its place.
        """
        before = datetime.now(UTC) - timedelta(seconds=LEFTOVER_SECONDS)
        self.files.invalidate_cache()
        there = set(self.files.find(self.root))
        for path in there:
            folder, _, name = path.rpartition("/")
            if (
                name == STATE
                and NAME.fullmatch(folder.removeprefix(f"{self.root}/"))
                and f"{folder}/{MANIFEST}" not in there
                and _aware(self.files.modified(path)) < before
            ):
                self.files.rm_file(path)
        if self.name.startswith(("s3://", "s3a://")):
            bucket, _, prefix = self.root.partition("/")
            answer = self.files.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=f"{prefix}/step_".lstrip("/"))
            for upload in answer.get("Uploads", []):
                if upload["Initiated"] < before:
                    self.files.call_s3(
                        "abort_multipart_upload", Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"]
                    )

    def forget(self) -> None:
        """Free the memory of the state that was read last."""
        self._fetched = None

    def _info(self, step: int, file: str) -> dict[str, Any]:
        self.files.invalidate_cache()
        facts: dict[str, Any] = self.files.info(self._path(step, file))
        return facts

    def _path(self, step: int, file: str) -> str:
        return f"{self.root}/{step_name(step)}/{file}"


class HashedFile:
    """A file to write to once, front to back; keeps size, sha256, and the error that the disk gave."""

    def __init__(self, file: Any) -> None:
        self.file = file
        self.bytes, self._digest = 0, hashlib.sha256()
        self._error: Exception | None = None

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    @property
    def sha256(self) -> str:
        """Of what was written."""
        return self._digest.hexdigest()

    def written_by(self, writer: Writer) -> None:
        """Let `writer` write to this file, and raise the disk's own error where there is one.

        torch's zip writer turns the disk's refusal into an error of its own; the disk's is the one to tell.
        """
        try:
            writer(self)  # type: ignore[arg-type]
        except Exception:
            if self._error is not None:
                raise self._error from None
            raise
        self.file.flush()

    def write(self, data: Any) -> int:
        """All of `data`."""
        try:
            self.file.write(data)
        except Exception as error:
            self._error = error
            raise
        self._digest.update(data)
        size = memoryview(data).nbytes
        self.bytes += size
        return size

    def flush(self) -> None:
        """To the file."""
        self.file.flush()


def _aware(moment: datetime) -> datetime:
    """A time with its zone; where a store names none it means UTC."""
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
