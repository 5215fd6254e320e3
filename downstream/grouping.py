"""Images, features and streams of many sizes in few passes: those of a kind together, or padded to one size."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.codec.backbone import multiple_of

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


def pad_features(features: Sequence[Tensor], step: int = 1) -> Tensor:
    """(N, C, h, w): features of any sizes, padded with zeros to the largest, in multiples of `step`."""
    height, width = (multiple_of(max(one.shape[axis] for one in features), step) for axis in (-2, -1))
    padded = [F.pad(one, (0, width - one.shape[-1], 0, height - one.shape[-2])) for one in features]
    return torch.stack(padded).contiguous(memory_format=torch.channels_last)
