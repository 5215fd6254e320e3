"""Files of tasks: there whole or not at all, and where the disk refuses, an error that says what to do."""

from __future__ import annotations

from pathlib import Path

from cluster.files import write_whole
from downstream.errors import TaskError


def write_file(path: Path, content: bytes | str, remedy: str = "free space, run it again") -> None:
    """Write a file as `write_whole` does (TaskError with the `remedy` where that is not possible)."""
    try:
        write_whole(path, content)
    except OSError as error:
        raise TaskError(f"{path}: cannot be written ({error.strerror}); {remedy}") from error
