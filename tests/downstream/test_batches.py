from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from downstream.batches import split_batch


class Parts(NamedTuple):
    images: torch.Tensor | None
    masks: torch.Tensor
    streams: list[bytes] | None


@pytest.mark.parametrize("least", [1, 2])
@pytest.mark.parametrize("most", [2, 3, 5, 16, None])
def test_split_batch__no_part_is_too_small_for_a_batch_norm(most: int | None, least: int):
    for share in range(2, 40):
        sizes = [count for _, count in split_batch(list(range(share)), most, least)]
        assert sum(sizes) == share and min(sizes) >= least and max(sizes) - min(sizes) <= 1
        allowed = 3 if most == least == 2 and share % 2 else most or share  # an odd share has no parts of 2 alone
        assert max(sizes) <= allowed


@pytest.mark.parametrize("most", [1, 3, 7, 8, None])
def test_split_batch__every_image_once_and_no_part_too_large(most: int | None):
    numbers = torch.arange(7)
    for batch, read in [
        (list(range(7)), lambda part: part),
        ((numbers, numbers), lambda part: part[1].tolist()),
        (Parts(numbers, numbers, None), lambda part: part.images.tolist()),
        (Parts(None, numbers, [bytes([n]) for n in range(7)]), lambda part: [stream[0] for stream in part.streams]),
    ]:
        parts = split_batch(batch, most)
        assert [number for part, _ in parts for number in read(part)] == list(range(7))
        assert [len(read(part)) for part, _ in parts] == [count for _, count in parts]
        assert all(type(part) is type(batch) for part, _ in parts)
        assert max(count for _, count in parts) <= (most or 7)
