"""The layouts that `dicm data build` reads, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from data_pipeline.errors import DataError
from data_pipeline.sources import cityscapes, coco, imagefolder, voc
from data_pipeline.sources.listing import Listing

ListSource = Callable[[Path, Mapping[str, str] | None], Listing]

LAYOUTS: dict[str, ListSource] = {
    "imagefolder": imagefolder.list_source,
    "voc": voc.list_source,
    "coco": coco.list_source,
    "cityscapes": cityscapes.list_source,
}


def list_source(layout: str, root: Path, splits: Mapping[str, str] | None = None) -> Listing:
    """What `root` holds, read as `layout`.

    Args:
        splits: names of the splits to make, each with the source's split it is made of; None: the layout's own.

    Raises:
        DataError: unknown layout, no such folder or split, or annotations that contradict themselves.
    """
    if layout not in LAYOUTS:
        raise DataError(f"layout {layout!r} is unknown; use {', '.join(LAYOUTS)}")
    try:
        if not root.is_dir():
            raise DataError(f"{root}: no such folder; name one that holds images")
        return LAYOUTS[layout](root, splits)
    except OSError as error:
        raise DataError(f"{error.filename or root}: cannot be read ({error.strerror}); mend its permissions") from error
