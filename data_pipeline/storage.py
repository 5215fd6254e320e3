"""Files at URLs, through fsspec: fetched whole, with time-outs, tried again where that can help.

A request ends in one of three ways: the bytes; a DataError, at once where trying again cannot help (the file is gone,
access is refused, the disk is full), after `Retries.attempts` downloads where the bytes are not those of the
manifest; or a StoreError, after as many attempts, where the store does not answer. Pauses between attempts grow and
have jitter, so that the processes of a cluster do not all come back at the same moment.

HTTP and S3 get a time-out for connecting and for silence while bytes should come; for other protocols fsspec's own
hold. Credentials, endpoints and proxies come from where fsspec and the stores' libraries look for them.
"""

from __future__ import annotations

import hashlib
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from fsspec.callbacks import Callback
from fsspec.core import url_to_fs

from cluster.errors import FULL
from data_pipeline.errors import DataError, StoreError

T = TypeVar("T")
LONGEST_PAUSE = 20.0  # seconds
TRY_LATER = (408, 425, 429)  # client errors of HTTP that pass
LONGEST_REASON = 200  # characters
LARGEST_READ = 2**30  # bytes of a file that is read whole: a manifest of 100 million samples


@dataclass(frozen=True)
class Retries:
    """How patient to be with a store."""

    attempts: int = 6
    backoff: float = 0.5  # seconds before the second attempt; doubled before each further one
    timeout: float = 30.0  # seconds to connect, and of silence

    def pause(self, failures: int) -> float:
        """Seconds to wait after so many failures: half of it fixed, half by chance."""
        return min(self.backoff * 2 ** (failures - 1), LONGEST_PAUSE) * random.uniform(0.5, 1.0)


class Damaged(Exception):  # noqa: N818  # no error of the user's: it is tried again
    """What arrived is not what was to come."""


def read(url: str, retries: Retries) -> bytes:
    """The bytes of a small file.

    Raises:
        FileNotFoundError: there is none.
        StoreError, DataError: the store does not answer; it refuses, or sends more than `LARGEST_READ` bytes.
    """
    filesystem, remote = _open_store(url, retries.timeout)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"

        def attempt() -> bytes:
            # Through a file, where bytes can be counted as they come: a store may send them without end.
            filesystem.get_file(remote, str(path), callback=_Measuring(LARGEST_READ, lambda _: None))
            return path.read_bytes()

        return _patiently(url, retries, attempt)


def download(
    url: str, path: Path, *, num_bytes: int, sha256: str, retries: Retries, received: Callable[[int], None]
) -> None:
    """Fetch `url` into the file `path`, which is there already, and check that it is what the manifest lists.

    Args:
        received: called with the bytes that came, also with those of attempts that failed.

    Raises:
        DataError: the file is gone or stays damaged, access is refused, the disk is full.
        StoreError: the store does not answer, or not to the end.
    """
    filesystem, remote = _open_store(url, retries.timeout)

    def attempt() -> None:
        filesystem.get_file(remote, str(path), callback=_Measuring(num_bytes, received))
        if (size := path.stat().st_size) != num_bytes:
            raise Damaged(f"{size} bytes came instead of {num_bytes}")
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                raise Damaged("its sha256 is not the manifest's")

    try:
        _patiently(url, retries, attempt)
    except FileNotFoundError as error:
        raise DataError(f"{url}: is gone from the store; upload the shard again") from error
    except OSError as error:
        raise DataError(
            f"{path.parent}: the disk is full ({error.strerror}) while {url} came; free {num_bytes} bytes, lower "
            "shard_cache_limit, or name another cache"
        ) from error


class _Measuring(Callback):
    """Counts bytes as they come, and ends a download that brings more than it should."""

    def __init__(self, num_bytes: int, received: Callable[[int], None]):
        super().__init__()
        self.num_bytes, self.received, self.total = num_bytes, received, 0

    def relative_update(self, inc: int = 1) -> None:
        self.total += inc
        self.received(inc)
        if self.total > self.num_bytes:
            raise Damaged(f"more than {self.num_bytes} bytes came")


def _open_store(url: str, timeout: float) -> tuple[Any, str]:
    """The file system of `url` and the path in it. fsspec keeps one of each kind for a thread, and none over a fork."""
    protocol = url.partition("://")[0]
    options: dict[str, Any] = {}
    try:
        if protocol in ("http", "https"):
            import aiohttp

            # Its default ends a download after five minutes, however well it goes.
            limits = aiohttp.ClientTimeout(total=None, sock_connect=timeout, sock_read=timeout)
            options = {"client_kwargs": {"timeout": limits, "trust_env": True}}
        elif protocol in ("s3", "s3a"):
            # Attempts are counted here alone, or three layers would multiply theirs.
            config = {"connect_timeout": timeout, "read_timeout": timeout, "retries": {"total_max_attempts": 1}}
            # One stream a download: ten of 50 MB each would be held in memory. Shards come side by side instead.
            options = {"config_kwargs": config, "max_concurrency": 1}
        filesystem, path = url_to_fs(url, **options)
    except ImportError as error:
        extra = "pip install 'dicm[s3]'" if protocol in ("s3", "s3a") else "install what the message names"
        raise DataError(f"{url}: {protocol}:// needs a package that is missing ({_reason(error)}); {extra}") from error
    except ValueError as error:
        known = ", ".join(name for name in ("https", "s3", "gs", "hf") if name in fsspec.available_protocols())
        raise DataError(f"{url}: cannot be opened ({_reason(error)}); use a folder, or one of {known}") from error
    if protocol in ("s3", "s3a"):
        filesystem.retries = 1
    return filesystem, path


def _patiently(url: str, retries: Retries, attempt: Callable[[], T]) -> T:
    """The result of `attempt`; FileNotFoundError and a full disk pass through, the rest becomes one line."""
    failures = 0
    while True:
        try:
            return attempt()
        except FileNotFoundError:
            raise
        except Exception as error:  # the stores' libraries share no class of their own
            if isinstance(error, OSError) and error.errno in FULL:
                raise
            status = getattr(error, "status", None)
            refused = isinstance(status, int) and 400 <= status < 500 and status not in TRY_LATER
            if refused or isinstance(error, PermissionError):
                raise DataError(
                    f"{url}: the store refuses it ({_reason(error)}); check the address and the credentials"
                ) from error
            failures += 1
            if failures >= retries.attempts:
                if isinstance(error, Damaged):
                    raise DataError(
                        f"{url}: damaged at the store ({error}; fetched {failures} times); upload the shard again"
                    ) from error
                raise StoreError(
                    f"{url}: cannot be fetched ({_reason(error)}; {failures} attempts); check the store and the "
                    "network, then run the same command"
                ) from error
            time.sleep(retries.pause(failures))


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:LONGEST_REASON]}".removesuffix(": ")
