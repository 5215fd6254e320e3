"""Files that are there whole or not at all, whenever the process or the machine stops."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: Path, content: bytes | str, *, new: bool = False) -> None:
    """Write a file, making its folder; a reader sees what was there before or all of the new (OSError: refused).

    Args:
        new: leave a file that is there already as it is, even if it came meanwhile (FileExistsError).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        (os.link if new else os.replace)(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
