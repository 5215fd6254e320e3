"""Shards of remote data sets on the local disk: one download a node, verified, bounded, shared by all processes.

    CACHE/shards/
      .lock                    held while room is made
      SHA256.tar               a shard, named by its content; atime: last use, mtime: when it came
      SHA256.BYTES.part        a download under way, its file locked by the process that fetches it

Processes agree through locks on these files alone (flock), which the kernel drops with the process that held them,
however it died: there is no shared memory and nothing to clean by hand. A partial file that no one has locked
belongs to a killed download and is fetched anew or removed by whoever comes next.

Where the file system has no locks, each download has a name of its own, SHA256.BYTES.RANDOM.part, and is renamed when
it is whole: several processes may fetch the same shard, and the limit may be exceeded. Copies are unlinked and not
emptied, so that who reads from one reads on; what a killed download left is removed an hour later.

A shard is in use while a process reads from it, and holds a shared lock for just that time. Whoever needs room
removes the copies that were used longest ago and are not in use, and takes their space back at once, also from
processes that still have them open: these see that the copy is gone and fetch it again. The sizes of all copies and
downloads exceed `limit` by one shard at most.

Each process hashes a copy once before it uses a byte of it, also one that another process downloaded and checked: a
disk may damage what had arrived whole. That costs 0.2 s for 256 MiB, beside the seconds that fetching them took.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from cluster.locks import lock
from data_pipeline.addresses import join
from data_pipeline.errors import DataError, unusable

if TYPE_CHECKING:
    from data_pipeline.manifest import Shard
    from data_pipeline.storage import Retries

GIB = 2**30
DEFAULT_LIMIT = 64 * GIB
ROOT_VARIABLE = "DICM_CACHE"
TOUCH_SECONDS = 1.0  # how precisely the last use is noted
ROOM_SECONDS = 600.0  # how long to wait for others to finish with their shards
POLL_SECONDS = 0.05
ABANDONED_SECONDS = 3600.0  # without a byte, after which a download that no lock guards is a killed one's

# Descriptors with exclusive locks of this process. A child that is forked meanwhile has copies, which would keep the
# locks after our death.
_locked: set[int] = set()


def _close_copies() -> None:
    for descriptor in _locked:
        os.close(descriptor)
    _locked.clear()


os.register_at_fork(after_in_child=_close_copies)


def default_root() -> Path:
    """$DICM_CACHE, or the folder `dicm` in the user's cache folder."""
    if root := os.environ.get(ROOT_VARIABLE):
        return Path(root)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dicm"


class CachedShard(io.FileIO):
    """A copy, open for reading. Its bytes count only between `hold`, where that returns True, and `release`."""

    def __init__(self, path: Path):
        super().__init__(path, "rb")
        self._folder, self._owner, self._touched = path.parent, os.getpid(), 0.0

    def hold(self) -> bool:
        """Lock the copy against removal and note its use; False, and no lock, where it was removed before."""
        lock(self.fileno(), fcntl.LOCK_SH, self._folder)
        status = os.fstat(self.fileno())
        if status.st_nlink == 0:
            self.release()
            return False
        if (now := time.monotonic()) > self._touched + TOUCH_SECONDS:
            os.utime(self.fileno(), ns=(time.time_ns(), status.st_mtime_ns))
            self._touched = now
        return True

    def release(self) -> None:
        """Allow the copy to be removed."""
        lock(self.fileno(), fcntl.LOCK_UN, self._folder)

    def close(self) -> None:
        """Close the file; the lock goes too, though a forked process may still have a copy of the descriptor."""
        if not self.closed and os.getpid() == self._owner:
            self.release()
        super().close()


class ShardCache:
    """The shards of remote data sets on this node; every process has its own object for the same folder.

    Args:
        root: folder on a local disk; `default_root()` if not given.
        limit: bytes that the shards may take.
        retries: how patient to be with the store.

    Attributes:
        fetched_bytes, fetched_shards: what this object downloaded, attempts that failed included in the bytes.

    Raises:
        DataError: a limit that is not positive.
    """

    def __init__(self, root: str | Path | None = None, limit: int = DEFAULT_LIMIT, retries: Retries | None = None):
        if limit <= 0:
            raise DataError(f"a cache of {limit} bytes is impossible; give it room for some shards")
        self.root = Path(root) if root else default_root()
        self.folder = self.root / "shards"
        self.limit, self.retries = limit, retries
        self.fetched_bytes = self.fetched_shards = 0
        self._verified: dict[str, tuple[int, int]] = {}  # sha256 -> identity of the file that was hashed
        self._owner = os.getpid()

    @classmethod
    def of_size(cls, root: str | Path | None, gibibytes: float) -> Self:
        """A cache with a limit in GiB."""
        return cls(root, int(gibibytes * GIB))

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root, "limit": self.limit, "retries": self.retries}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def open(self, root: str | Path, shard: Shard) -> CachedShard:
        """The copy of a shard of the data set `root`, fetched where needed, verified by this process, and held.

        Raises:
            DataError: it is gone, damaged at the store, or there is no room; the store refuses or the disk fails.
            StoreError: the store does not answer.
        """
        attempts = self._retries.attempts
        with self._disk_errors():
            for _ in range(attempts):
                copy = self._present(shard) or self._fetched(root, shard)
                if self._verify(copy, shard):
                    return copy
                self._discard(copy, shard)
        raise DataError(
            f"{join(root, shard.name)}: its copy in {self.folder} was damaged after it had come whole, {attempts} "
            "times; check that disk, or name another cache"
        )

    def fetch(self, root: str | Path, shard: Shard) -> None:
        """Bring a shard into the cache, where it is not there yet; raises what `open` raises."""
        with self._disk_errors():
            if not self._path(shard).exists():
                self._fetched(root, shard).close()

    @property
    def _retries(self) -> Retries:
        from data_pipeline.storage import Retries  # imports fsspec, which local data sets do without

        return self.retries or Retries()

    def _path(self, shard: Shard) -> Path:
        return self.folder / f"{shard.sha256}.tar"

    def _present(self, shard: Shard) -> CachedShard | None:
        """The copy that is there, held; None where there is none."""
        while True:
            try:
                copy = CachedShard(self._path(shard))
            except FileNotFoundError:
                return None
            if copy.hold():
                return copy
            copy.close()

    def _fetched(self, root: str | Path, shard: Shard) -> CachedShard:
        """The copy, held, downloaded by this process or by another that was faster."""
        from data_pipeline.storage import download

        self.folder.mkdir(parents=True, exist_ok=True)
        while (copy := self._present(shard)) is None:
            with self._reserved(shard) as reserved:
                if reserved is None or self._path(shard).exists():
                    continue
                part, descriptor = reserved
                download(
                    join(root, shard.name),
                    part,
                    num_bytes=shard.bytes,
                    sha256=shard.sha256,
                    retries=self._retries,
                    received=self._count,
                )
                self.fetched_shards += 1
                with self._room_lock():  # so that no one removes the copy before it is held
                    copy = CachedShard(part)  # before it has its name, by which others may remove it
                    os.replace(part, self._path(shard))
                    lock(descriptor, fcntl.LOCK_UN, self.folder)
                    copy.hold()
                # `download` has hashed it in this very process.
                self._verified[shard.sha256] = _identity(os.fstat(copy.fileno()))
                return copy
        return copy

    def _count(self, num_bytes: int) -> None:
        self.fetched_bytes += num_bytes

    @contextmanager
    def _reserved(self, shard: Shard) -> Iterator[tuple[Path, int] | None]:
        """A file to download to and its descriptor, locked while the block lasts, with room for the shard.

        Where another process has locked it, wait for its download instead: None.
        """
        deadline = time.monotonic() + ROOM_SECONDS
        while True:
            with self._room_lock() as has_locks:
                name = "" if has_locks else f".{secrets.token_hex(8)}"
                part = self.folder / f"{shard.sha256}.{shard.bytes}{name}.part"
                descriptor = os.open(part, os.O_RDWR | os.O_CREAT, 0o644)
                _locked.add(descriptor)
                ours = _try_lock(descriptor, self.folder)
                room = ours and self._make_room(shard.bytes, part)
            try:
                if room:
                    yield part, descriptor
                    return
                if not ours:
                    lock(descriptor, fcntl.LOCK_SH, self.folder)
                    yield None
                    return
            finally:
                if ours:
                    with self._room_lock():
                        _unlink_if(part, descriptor)  # not there after a download that went well
                _unlock(descriptor, self.folder)
            if time.monotonic() > deadline:
                raise DataError(
                    f"{self.folder}: no room for {shard.name}, all shards in {self.limit / GIB:g} GiB are in use; "
                    "raise shard_cache_limit"
                )
            time.sleep(POLL_SECONDS)

    def _make_room(self, num_bytes: int, part: Path) -> bool:
        """Remove copies not in use, least recently used first, until `num_bytes` fit; True where they may come.

        They may also come where what is left, all of it in use or on its way, is within the limit.
        """
        used, copies = 0, []
        for path in self.folder.iterdir():
            if path.suffix == ".tar":
                with suppress(FileNotFoundError):  # removed meanwhile, where there are no locks
                    status = path.stat()
                    copies.append((status.st_atime_ns, status.st_size, path))
                    used += status.st_size
            elif path.suffix == ".part" and path != part and not _remove(path):
                used += int(path.name.split(".")[1])
        for _, size, path in sorted(copies):
            if used + num_bytes <= self.limit:
                break
            if _remove(path):
                used -= size
        return used <= self.limit

    def _verify(self, copy: CachedShard, shard: Shard) -> bool:
        """Whether the copy is what the manifest lists; hashed unless this process has hashed this very file."""
        if self._owner != os.getpid():
            self._verified, self._owner = {}, os.getpid()  # what the parent process checked, a disk may have damaged
        status = os.fstat(copy.fileno())
        if self._verified.get(shard.sha256) == _identity(status):
            return True
        copy.seek(0)
        if status.st_size != shard.bytes or hashlib.file_digest(copy, "sha256").hexdigest() != shard.sha256:
            return False
        self._verified[shard.sha256] = _identity(status)
        return True

    def _discard(self, copy: CachedShard, shard: Shard) -> None:
        """Remove a damaged copy, unless another process has already put a new one in its place."""
        with copy, self._room_lock():
            _unlink_if(self._path(shard), copy.fileno())

    @contextmanager
    def _room_lock(self) -> Iterator[bool]:
        """The lock under which room is made; False where the file system has none."""
        descriptor = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        _locked.add(descriptor)
        try:
            yield lock(descriptor, fcntl.LOCK_EX, self.folder)
        finally:
            _unlock(descriptor, self.folder)

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise unusable(
                error,
                f"{error.filename or self.folder}: the cache cannot be used ({error.strerror}); mend that, or name "
                f"another folder by cache=DIR or ${ROOT_VARIABLE}",
            ) from error


def _try_lock(descriptor: int, folder: Path) -> bool:
    """False where another process has locked the file."""
    try:
        lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, folder)
    except BlockingIOError:
        return False
    return True


def _unlock(descriptor: int, folder: Path) -> None:
    lock(descriptor, fcntl.LOCK_UN, folder)
    _locked.discard(descriptor)
    os.close(descriptor)


def _remove(path: Path) -> bool:
    """Remove a file that no one has locked and give its space back; called with the room lock held."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:  # removed meanwhile, where there are no locks
        return True
    _locked.add(descriptor)
    try:
        has_locks = lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, path.parent)
        if not has_locks and path.suffix == ".part":
            written = os.fstat(descriptor).st_mtime
            if time.time() - written < ABANDONED_SECONDS:
                return False
        path.unlink(missing_ok=True)
        if has_locks:
            os.ftruncate(descriptor, 0)  # others may have it open
        return True
    except BlockingIOError:
        return False
    finally:
        _unlock(descriptor, path.parent)


def _unlink_if(path: Path, descriptor: int) -> None:
    """Remove `path` where it still is the file that `descriptor` has open."""
    with suppress(FileNotFoundError):
        if os.path.samestat(path.stat(), os.fstat(descriptor)):
            path.unlink()


def _identity(status: os.stat_result) -> tuple[int, int]:
    """A file's inode and time of writing: another download, or a change, gives another identity."""
    return status.st_ino, status.st_mtime_ns
