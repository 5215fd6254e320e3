"""Files that are whole or not there, and files of others: regular ones of bounded size."""

from __future__ import annotations

import errno
import io
import os
import stat
from pathlib import Path
from typing import Any

from cluster.files import beside

LARGEST_FILE = 2**30  # bytes; images and streams are smaller by far
KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}


def open_file(path: Path) -> io.FileIO:
    """A regular file, opened for reading; links to one are followed.

    Raises:
        OSError: it cannot be opened, or is something else: a FIFO would wait for a writer, a device may have no end.
    """
    # Nothing waits while it is opened; for regular files O_NONBLOCK says nothing.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
    if kind != stat.S_IFREG:
        os.close(descriptor)
        raise OSError(errno.EINVAL, f"it is {KINDS.get(kind, 'something else')}, not a regular file", str(path))
    return io.FileIO(descriptor)


def read_file(path: Path, limit: int = LARGEST_FILE) -> bytes:
    """The bytes of a regular file of at most `limit` bytes (OSError: see `open_file`; or it is larger)."""
    with io.BufferedReader(open_file(path)) as file:
        if (size := os.fstat(file.fileno()).st_size) > limit:
            raise OSError(errno.EFBIG, f"it has {size} bytes, more than {limit}", str(path))
        return file.read(size)  # no more than it had, should it grow


class Replacing(io.FileIO):
    """A file that appears under its name when the `with` block ends well, and not at all otherwise."""

    def __init__(self, path: Path):
        self.path, self.temporary = path, beside(path)
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
