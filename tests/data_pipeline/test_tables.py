from __future__ import annotations

import io
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from data_pipeline.inspect import SplitFacts
from data_pipeline.manifest import Manifest
from data_pipeline.tables import bar, tables

NAMES = tuple(f"a class with the long name {number}" for number in range(45))
MANIFEST = Manifest("set", NAMES, {}, semantic_classes=("background", *NAMES))


def facts_of(scale: int, splits: tuple[str, ...] = ("train", "val", "test")) -> dict[str, SplitFacts]:
    counts = Counter({label: scale * label for label in range(45)})
    return {
        split: SplitFacts(
            samples=scale, bytes=scale * 10**5, shards=scale // 1000, widths=Counter({640: 1, 12345: 1}),
            heights=Counter({480: 1, 12345: 1}), sides=Counter({3: 1, 12: scale}), labels=counts, box_images=counts,
            box_labels=counts, semantic_images=counts, semantic_pixels=counts, masks=scale, semantic=scale,
        )
        for split in splits
    }  # fmt: skip


def printed(manifest: Manifest, facts: dict[str, SplitFacts], width: int = 80) -> str:
    file = io.StringIO()
    console = Console(file=file, width=width, highlight=False, soft_wrap=True)
    for table in tables(manifest, facts):
        console.print(table)
    return file.getvalue()


@pytest.mark.parametrize("splits", [("train",), ("train", "val")])
def test_tables__stay_within_eighty_columns(splits: tuple[str, ...]):
    """With counts of a million images and long names."""
    lines = printed(MANIFEST, facts_of(1_200_000, splits)).splitlines()
    assert max(map(len, lines)) <= 80


def test_tables__the_most_frequent_classes_come_first_and_the_rest_is_counted():
    text = printed(MANIFEST, facts_of(2, ("train",)))
    classes = text[text.index("45 classes") : text.index("46 semantic")]
    rows = [line for line in classes.splitlines() if "a class with" in line]
    assert len(rows) == 30 and "88" in rows[0] and "86" in rows[1]
    assert "15 more" in classes and str(sum(2 * label for label in range(15))) in classes


def test_tables__say_only_what_the_data_set_has():
    facts = {
        "train": SplitFacts(samples=3, shards=1, widths=Counter({9: 3}), heights=Counter({9: 3}), sides=Counter({0: 3}))
    }
    text = printed(Manifest("bare", (), {}), facts)
    assert "boxes" not in text and "class" not in text and "semantic" not in text
    assert "1..32" in text


def test_tables__an_empty_data_set_has_its_name():
    assert "nothing" in printed(Manifest("nothing", (), {}), {})


def test_tables__semantic_shares_add_up():
    pixels = Counter({0: 50, 1: 25, 255: 25})
    facts = {"train": SplitFacts(samples=1, semantic=1, semantic_images=Counter([0, 1, 255]), semantic_pixels=pixels)}
    text = printed(Manifest("s", (), {}, semantic_classes=("road", "sky")), facts)
    for words in ("0   road", "50.0%", "255   ignored", "25.0%"):
        assert words in text


@given(st.integers(0, 10**9), st.integers(1, 10**9), st.integers(1, 40))
def test_bar__is_never_longer_than_its_width_and_shows_what_is_there(value: int, greatest: int, width: int):
    text = bar(min(value, greatest), greatest, width)
    assert len(text) <= width
    assert bool(text) == (min(value, greatest) > 0)
