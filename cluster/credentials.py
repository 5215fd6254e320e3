"""Addresses with a key or a token in them are refused: they would stand in configs, lists of jobs, logs and errors."""

from __future__ import annotations

import re

# `USER:SECRET@`, whatever the store; or one word, where it may be a token. A port is no secret.
CREDENTIALS = re.compile(r"://[^/@\s:]*:(?!\d+/)[^@\s]*@|\b(?:https?|s3a?)://[^/@\s]+@")


def refusal(text: str) -> str | None:
    """What to tell of an address with credentials, without showing them; None of any other text.

    Args:
        text: the address, or `key=address`.
    """
    if CREDENTIALS.search(text) is None:
        return None
    return (
        f"{text.partition('://')[0]}://...: the address holds credentials, which would be written down with it; leave "
        "them out of it, and give them by environment variables (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY) or a "
        "profile (AWS_PROFILE)"
    )
