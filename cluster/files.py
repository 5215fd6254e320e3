"""Files that are there whole or not at all, whenever the process or the machine stops; lines appended to one."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, TypeVar

from cluster.errors import is_passing

T = TypeVar("T")
RETRY_SECONDS = (0.1, 1.0)  # waited before what a storage did not do is asked of it again


def write_whole(path: Path, content: bytes | str, *, new: bool = False) -> None:
    """Write a file, making its folder; a reader sees what was there before or all of the new (OSError: refused).

    Args:
        new: leave a file that is there already as it is, even if it came meanwhile (FileExistsError).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = beside(path)
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        (os.link if new else os.replace)(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def beside(path: Path) -> Path:
    """A name in the same folder that no one else has, hidden: machines and containers share process ids."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}")


def append_line(path: Path, line: str) -> None:
    """Append a line, for one writer at a time; after a torn one, as a full disk leaves it, on a line of its own.

    Raises:
        OSError: refused; the file may hold a part of the line.
    """
    with path.open("a+b") as file:
        append_to(file, line)


def append_to(file: BinaryIO, line: str) -> None:
    """As `append_line`, to a file that is open as `a+b`."""
    if is_torn := file.seek(0, os.SEEK_END) > 0:
        file.seek(-1, os.SEEK_END)
        is_torn = file.read(1) != b"\n"
    file.write((b"\n" if is_torn else b"") + line.encode() + b"\n")
    file.flush()


def patiently(attempt: Callable[[], T]) -> T:
    """The result of `attempt`, which is tried again after an OSError that may pass; the last one is raised."""
    for pause in RETRY_SECONDS:
        try:
            return attempt()
        except OSError as error:
            if not is_passing(error):
                raise
        time.sleep(pause)
    return attempt()
