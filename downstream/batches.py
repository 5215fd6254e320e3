"""Batches in parts, for workers that cannot hold their share of images at once."""

from __future__ import annotations

import itertools
from typing import Any


def split_batch(batch: Any, most: int | None, least: int = 1) -> list[tuple[Any, int]]:
    """Parts of nearly equal size, and how many images each has: of a list, or of a tuple of tensors and lists.

    Args:
        most: images of a part; all where None.
        least: images of a part. It goes before `most`: an odd share in parts of 2 has one of 3.
    """
    fields = [batch] if isinstance(batch, list) else [field for field in batch if field is not None]
    share = len(fields[0])
    num_parts = max(min(-(-share // (most or share)), share // least), 1)
    ends = [share * number // num_parts for number in range(num_parts + 1)]
    cuts = [slice(start, end) for start, end in itertools.pairwise(ends)]

    def cut(part: slice) -> Any:
        if isinstance(batch, list):
            return batch[part]
        values = [None if field is None else field[part] for field in batch]
        return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)

    return [(cut(part), part.stop - part.start) for part in cuts]
