"""Batches in parts, for workers that cannot hold their share of images at once."""

from __future__ import annotations

from typing import Any


def split_batch(batch: Any, most: int | None) -> list[tuple[Any, int]]:
    """Parts of at most that many images, and how many each has: of a list, or of a tuple of tensors and lists."""
    fields = [batch] if isinstance(batch, list) else [field for field in batch if field is not None]
    share = len(fields[0])
    step = most or share
    cuts = [slice(start, start + step) for start in range(0, share, step)]

    def cut(part: slice) -> Any:
        if isinstance(batch, list):
            return batch[part]
        values = [None if field is None else field[part] for field in batch]
        return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)

    return [(cut(part), len(range(share)[part])) for part in cuts]
