"""Tables of a data set's facts for the terminal, within 80 columns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from rich import box
from rich.table import Table

from data_pipeline.inspect import IGNORE, SIDES, SplitFacts
from data_pipeline.manifest import Manifest

SHOWN_CLASSES = 30
NAME, BAR, NARROW_BAR = 20, 24, 12  # characters
EIGHTHS = " ▏▎▍▌▋▊▉"


def tables(manifest: Manifest, facts: Mapping[str, SplitFacts], ascii_only: bool = False) -> list[Table]:
    """Counts of the splits, and the histograms of what the data set has: classes, semantic classes, sizes.

    Args:
        ascii_only: bars of "#", for terminals that are not UTF-8.
    """
    found = [_splits(manifest, facts)]
    if any(of.class_images for of in facts.values()):
        found.append(_classes(manifest, facts, ascii_only))
    if any(of.semantic for of in facts.values()):
        found.append(_semantic(manifest, facts, ascii_only))
    return [*found, _sizes(facts, ascii_only)]


def bar(value: float, greatest: float, width: int, ascii_only: bool = False) -> str:
    """A bar of up to `width` characters, in eighths of one, or of whole "#"; what is not nothing shows."""
    if value <= 0 or greatest <= 0:
        return ""
    if ascii_only:
        return "#" * max(1, round(width * value / greatest))
    eighths = max(1, round(8 * width * value / greatest))
    return "█" * (eighths // 8) + EIGHTHS[eighths % 8].strip()


def _table(title: str, *columns: str, bars: bool = False) -> Table:
    """A table whose first column is text, the others numbers, the last one bars where wanted."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        is_text = number == 0 or (bars and number == len(columns) - 1)
        table.add_column(column, justify="left" if is_text else "right", no_wrap=True)
    return table


def _splits(manifest: Manifest, facts: Mapping[str, SplitFacts]) -> Table:
    kinds = [kind for kind in ("boxes", "masks", "semantic") if any(getattr(of, kind) for of in facts.values())]
    table = _table(manifest.name, "split", "images", "shards", "MiB", "width", "height", *kinds)
    for name, of in facts.items():
        counts = (f"{getattr(of, kind):,}" for kind in kinds)
        sizes = (_range(of.widths), _range(of.heights))
        table.add_row(name, f"{of.samples:,}", f"{of.shards:,}", f"{of.bytes / 2**20:,.1f}", *sizes, *counts)
    return table


def _classes(manifest: Manifest, facts: Mapping[str, SplitFacts], ascii_only: bool) -> Table:
    """Images and boxes of each class, the most frequent first; bars are the first split's."""
    boxes = any(of.boxes for of in facts.values())
    kinds = ("images", "boxes") if boxes else ("images",)
    table = _table(
        f"{_number(len(manifest.classes), 'class', 'classes')}, the most frequent first",
        "class",
        *(f"{name}\n{kind}" for name in facts for kind in kinds),
        "",
        bars=True,
    )
    counts = {name: {"images": of.class_images, "boxes": of.box_labels} for name, of in facts.items()}
    leading = next(iter(counts.values()))[kinds[-1]]
    order = sorted(range(len(manifest.classes)), key=lambda label: (-leading[label], label))
    greatest = max(leading.values(), default=0)
    for label in order[:SHOWN_CLASSES]:
        numbers = (f"{counts[name][kind][label]:,}" for name in facts for kind in kinds)
        width = _bar_width(facts, kinds)
        name = _short(manifest.classes[label], ascii_only)
        table.add_row(name, *numbers, bar(leading[label], greatest, width, ascii_only))
    if rest := order[SHOWN_CLASSES:]:
        sums = (f"{sum(counts[name][kind][label] for label in rest):,}" for name in facts for kind in kinds)
        table.add_row(f"{len(rest)} more", *sums, "")
    return table


def _semantic(manifest: Manifest, facts: Mapping[str, SplitFacts], ascii_only: bool) -> Table:
    """Images with each semantic class and its share of all pixels; bars are the first split's shares."""
    kinds = ("images", "pixels")
    table = _table(
        f"{_number(len(manifest.mask_names), 'semantic class', 'semantic classes')} by mask value",
        "value",
        "class",
        *(f"{name}\n{kind}" for name in facts for kind in kinds),
        "",
        bars=True,
    )
    table.columns[0].justify, table.columns[1].justify = "right", "left"
    shares = {name: _shares(of.semantic_pixels) for name, of in facts.items()}
    leading = next(iter(shares.values()))
    greatest = max(leading.values(), default=0)
    for value, label in [*enumerate(manifest.mask_names), (IGNORE, "ignored")]:
        cells = (
            cell
            for name, of in facts.items()
            for cell in (f"{of.semantic_images[value]:,}", f"{shares[name].get(value, 0):.1%}")
        )
        width = _bar_width(facts, kinds)
        name = _short(label, ascii_only)
        table.add_row(str(value), name, *cells, bar(leading.get(value, 0), greatest, width, ascii_only))
    return table


def _sizes(facts: Mapping[str, SplitFacts], ascii_only: bool) -> Table:
    """Images by their longer side."""
    table = _table("longer side of the images", "pixels", *facts, "", bars=True)
    total = sum((of.sides for of in facts.values()), Counter[int]())
    for number in range(min(total, default=0), max(total, default=-1) + 1):
        first = SIDES[number - 1] + 1 if number else 1
        name = f"{first}..{SIDES[number]}" if number < len(SIDES) else f"from {first}"
        counts = (f"{of.sides[number]:,}" for of in facts.values())
        table.add_row(name, *counts, bar(total[number], max(total.values()), BAR, ascii_only))
    return table


def _shares(pixels: Counter[int]) -> dict[int, float]:
    return {value: count / pixels.total() for value, count in pixels.items()}


def _bar_width(facts: Mapping[str, SplitFacts], kinds: Iterable[str]) -> int:
    return BAR if len(facts) * len(tuple(kinds)) <= 2 else NARROW_BAR


def _range(sizes: Counter[int]) -> str:
    low, high = min(sizes, default=0), max(sizes, default=0)
    return str(low) if low == high else f"{low}..{high}"


def _short(name: str, ascii_only: bool) -> str:
    name, more = name.split(",")[0], "..." if ascii_only else "…"
    return name if len(name) <= NAME else name[: NAME - len(more)] + more


def _number(count: int, one: str, many: str) -> str:
    return f"{count:,} {one if count == 1 else many}"
