"""Where a data set is: a folder of this machine (a path or file://), or a URL that fsspec knows (s3://, https://)."""

from __future__ import annotations

import re
from pathlib import Path

from data_pipeline.errors import DataError

# `USER:SECRET@`, whatever the store; or one word, where it may be a token. A port is no secret.
CREDENTIALS = re.compile(r"://[^/@\s:]*:(?!\d+/)[^@\s]*@|\b(?:https?|s3a?)://[^/@\s]+@")
LOCAL = ("file://", "local://")


def is_remote(root: str | Path) -> bool:
    """Whether `root` is at a store, so that its shards go through a cache.

    Raises:
        DataError: a `pipe:` address, which would run a command; one with credentials, which errors would show.
    """
    text = str(root)
    if CREDENTIALS.search(text):
        raise DataError(
            f"{text.partition('://')[0]}://...: the address holds credentials, which would be written down with it; "
            "leave them out of it, and give them by environment variables (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY) "
            "or a profile (AWS_PROFILE)"
        )
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
