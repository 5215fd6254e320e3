"""Items of unequal kinds, those of a kind together: images and streams of many sizes in few passes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def in_groups(items: Sequence[T], key: Callable[[T], Hashable], function: Callable[[list[T]], list[R]]) -> list[R]:
    """`function` of the items of each key together; the results in the order of the items."""
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for number, item in enumerate(items):
        groups[key(item)].append(number)
    found: dict[int, R] = {}
    for numbers in groups.values():
        found.update(zip(numbers, function([items[number] for number in numbers]), strict=True))
    return [found[number] for number in range(len(items))]
