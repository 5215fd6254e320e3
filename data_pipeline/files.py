"""Files that are whole or not there, and lines appended to one."""

from __future__ import annotations

import io
import os
import secrets
from pathlib import Path
from typing import Any, BinaryIO


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


def beside(path: Path) -> Path:
    """A name in the same folder that no one else has, hidden: machines and containers share process ids."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}")


def append_line(file: BinaryIO, line: str) -> None:
    """Append a line to a file open as `a+b`; after a torn one, as a full disk leaves it, on a line of its own."""
    if is_torn := file.seek(0, os.SEEK_END) > 0:
        file.seek(-1, os.SEEK_END)
        is_torn = file.read(1) != b"\n"
    file.write((b"\n" if is_torn else b"") + line.encode() + b"\n")
    file.flush()
