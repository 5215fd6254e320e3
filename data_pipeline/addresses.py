"""Where a data set is: a folder of this machine (a path or file://), or a URL that fsspec knows (s3://, https://)."""

from __future__ import annotations

from pathlib import Path

from cluster.credentials import refusal
from data_pipeline.errors import DataError

LOCAL = ("file://", "local://")


def is_remote(root: str | Path) -> bool:
    """Whether `root` is at a store, so that its shards go through a cache.

    Raises:
        DataError: a `pipe:` address, which would run a command; one with credentials, which errors would show.
    """
    text = str(root)
    if line := refusal(text):
        raise DataError(line)
    if text.startswith("pipe:"):
        raise DataError(f"{text}: pipe: addresses run commands and are refused; name a folder or URL of shards")
    return "://" in text and not text.startswith(LOCAL)


def local_folder(root: str | Path) -> Path:
    """The folder that a local `root` names."""
    text = str(root)
    for scheme in LOCAL:
        text = text.removeprefix(scheme)
    return Path(text)


def join(root: str | Path, name: str) -> str:
    """The address of the file `name` in `root`."""
    return f"{str(root).rstrip('/')}/{name}" if is_remote(root) else str(local_folder(root) / name)
