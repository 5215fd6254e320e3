"""Files that are whole or not there."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any


class Replacing(io.FileIO):
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
