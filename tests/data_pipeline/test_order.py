"""The order of samples: what a run may rely on when it stops, resumes and changes its size."""

from __future__ import annotations

import itertools
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import DataError
from data_pipeline.order import ElasticSampler, SampleOrder, permute

GOLDEN = [0, 10, 9, 6, 5, 8, 2, 7, 4, 3, 1, 11, 0, 1, 5, 9, 8, 4, 7, 2, 11, 10, 3, 6]

shard_sizes = st.lists(st.integers(0, 12), min_size=1, max_size=9).filter(any)


@st.composite
def orders(draw: st.DrawFn) -> SampleOrder:
    """Orders of all shapes: empty shards, pools that do not divide, more lanes than samples."""
    return SampleOrder(draw(shard_sizes), draw(st.integers(0, 5)), draw(st.integers(0, 10)), draw(st.integers(1, 40)))


def batches(order: SampleOrder, batch_size: int, rank: int, world: int, start: int, count: int) -> list[list[int]]:
    return list(itertools.islice(ElasticSampler(order, batch_size, rank, world, start), count))


@given(orders(), st.integers(0, 4))
def test_take__each_sample_exactly_once_an_epoch(order: SampleOrder, epoch: int) -> None:
    start = epoch * order.num_samples
    taken = order.take(start, start + order.num_samples)
    assert taken.dtype == np.int64
    assert sorted(taken) == list(range(order.num_samples))


@given(orders(), st.integers(0, 300), st.integers(0, 120), st.integers(0, 120))
def test_take__pieces_join_to_the_whole_across_epochs(order: SampleOrder, start: int, first: int, second: int) -> None:
    whole = order.take(start, start + first + second)
    joined = [*order.take(start, start + first), *order.take(start + first, start + first + second)]
    assert whole.tolist() == joined


@given(orders())
def test_take__reads_across_lanes_of_nearly_equal_length(order: SampleOrder) -> None:
    epoch, size = order.epoch(1), order.num_samples
    chunks = np.array_split(epoch, order.num_lanes)  # its chunks, too, differ by at most one, longer ones first
    assert max(map(len, chunks)) - min(map(len, chunks)) <= 1
    for position, index in enumerate(order.take(size, 2 * size)):
        assert index == chunks[position % order.num_lanes][position // order.num_lanes]
    assert order.lanes(size, 2 * size).tolist() == [p % order.num_lanes for p in range(size)]


@given(st.integers(1, 12), st.integers(1, 60), st.integers(1, 10), st.integers(1, 40), st.integers(0, 3))
def test_epoch__few_shards_are_open_at_a_time(
    size: int, num_shards: int, shuffle_shards: int, num_lanes: int, epoch: int
) -> None:
    """A lane is read in one pass through the shards: those that it has begun and not ended are a pool's."""
    order = SampleOrder([size] * num_shards, seed=3, shuffle_shards=shuffle_shards, num_lanes=num_lanes)
    shards = order.epoch(epoch) // size
    for lane in np.array_split(shards, order.num_lanes):
        spans = [np.flatnonzero(lane == shard)[[0, -1]] for shard in np.unique(lane)]
        for place in range(len(lane)):
            # Two more than a pool holds: it begins and ends in the middle of shards.
            assert sum(first <= place <= last for first, last in spans) <= shuffle_shards + 2


@pytest.mark.parametrize("sizes", [[200] * 256, [200] * 255 + [37], [100 + 13 * k % 200 for k in range(256)]])
def test_sampler__a_rank_of_eight_needs_little_more_than_an_eighth_of_the_bytes(sizes: list[int]) -> None:
    order, starts = SampleOrder(sizes), np.cumsum(sizes)
    for rank in range(8):
        read = np.concatenate(batches(order, 256, rank, 8, 0, order.num_samples // 256))
        shards = np.unique(np.searchsorted(starts, read, side="right"))
        assert np.asarray(sizes)[shards].sum() <= 1.1 * sum(sizes) / 8


@given(orders(), st.integers(1, 10), st.sampled_from([(1, 2), (1, 3), (2, 4)]), st.integers(0, 90))
def test_sampler__the_world_changes_who_reads_but_not_what_is_read(
    order: SampleOrder, batch: int, worlds: tuple[int, int], start: int
) -> None:
    size = batch * 12  # divides by every world, so that global batches are equal
    read = [
        [sorted(itertools.chain(*ranks)) for ranks in zip(
            *(batches(order, size, rank, world, start, 2) for rank in range(world)), strict=True)]
        for world in worlds
    ]  # fmt: skip
    assert read[0] == read[1]
    assert read[0] == [sorted(order.take(start + k * size, start + (k + 1) * size).tolist()) for k in range(2)]


@given(orders(), st.integers(1, 50), st.integers(1, 6), st.integers(0, 60))
def test_sampler__ranks_share_the_largest_multiple_of_the_world(
    order: SampleOrder, batch: int, world: int, start: int
) -> None:
    batch = max(batch, world)
    ranks = [batches(order, batch, rank, world, start, 1)[0] for rank in range(world)]
    assert {len(rank) for rank in ranks} == {batch // world}
    # Also where the data set is smaller than the batch: positions run on into the next epochs.
    assert sorted(itertools.chain(*ranks)) == sorted(order.take(start, start + batch // world * world).tolist())


@given(orders(), st.integers(1, 30), st.integers(1, 4), st.integers(0, 6))
def test_sampler__resumes_anywhere_as_if_never_stopped(order: SampleOrder, batch: int, world: int, stop: int) -> None:
    batch = max(batch, world)
    whole = batches(order, batch, world - 1, world, 7, stop + 3)
    fresh = SampleOrder(order.shard_sizes.tolist(), order.seed, order.shuffle_shards, order.num_lanes)
    position = 7 + stop * ElasticSampler(fresh, batch, 0, world).global_batch
    assert batches(fresh, batch, world - 1, world, position, 3) == whole[stop:]


def test_sampler__resume_with_another_world_reads_each_sample_once() -> None:
    order = SampleOrder([50, 50, 20], seed=1)
    first = [batches(order, 24, rank, 3, 0, 2) for rank in range(3)]
    then = [batches(order, 24, rank, 2, 48, 3) for rank in range(2)]
    read = [index for rank in (*first, *then) for batch in rank for index in batch]
    assert sorted(read) == list(range(120))


def test_sampler__a_rank_keeps_to_its_lanes_and_so_to_few_shards() -> None:
    order = SampleOrder([100] * 64, seed=0, shuffle_shards=4, num_lanes=128)
    shards = [{index // 100 for batch in batches(order, 128, rank, 8, 0, 50) for index in batch} for rank in range(8)]
    assert max(map(len, shards)) <= 12  # of 64: two pools of four, and one at either edge


def test_sampler__iterates_again_from_the_same_position() -> None:
    sampler = ElasticSampler(SampleOrder([30]), 8, 0, 1, samples_seen=5)
    assert next(iter(sampler)) == next(iter(sampler))


def test_order__does_not_change_between_versions() -> None:
    # A run that is resumed after an upgrade must find the order that it began with.
    assert SampleOrder([4, 3, 5], seed=0, shuffle_shards=2, num_lanes=5).take(0, 24).tolist() == GOLDEN


def test_order__seeds_and_epochs_differ() -> None:
    order, other = SampleOrder([500], seed=0), SampleOrder([500], seed=1)
    assert order.epoch(0).tolist() != order.epoch(1).tolist()
    assert order.epoch(0).tolist() != other.epoch(0).tolist()


def test_order__without_shuffling_keeps_the_disk_order_within_lanes() -> None:
    assert SampleOrder([3, 3], shuffle_shards=0, num_lanes=1).take(0, 6).tolist() == [0, 1, 2, 3, 4, 5]


def test_epoch__an_earlier_one_can_be_read_again() -> None:
    order = SampleOrder([9, 4])
    first = order.epoch(0).tolist()
    order.epoch(6), order.epoch(7)
    assert order.epoch(0).tolist() == first


def test_take__memory_follows_the_shards_and_not_the_samples() -> None:
    num_shards, position = 100_000, 999 * 10**9
    order = SampleOrder(np.full(num_shards, 10_000))  # 10^9 samples
    tracemalloc.start()
    few = order.take(position, position + 256)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(set(few)) == 256
    assert peak < 200 * num_shards


@given(st.integers(1, 300), st.integers(0, 2**63 - 1))
def test_permute__is_a_permutation(size: int, key: int) -> None:
    items = np.arange(size)
    where = permute(items, np.full(size, size), np.full(size, key, np.uint64))
    assert sorted(where) == list(range(size))


def test_permute__every_permutation_is_as_likely() -> None:
    trials = 60_000
    keys = np.random.default_rng(0).integers(0, 2**63, trials, dtype=np.uint64)
    where = permute(np.tile(np.arange(4), trials), np.full(4 * trials, 4), np.repeat(keys, 4)).reshape(trials, 4)
    _, counts = np.unique(where @ 4 ** np.arange(4), return_counts=True)
    expected = trials / 24
    assert len(counts) == 24
    assert ((counts - expected) ** 2 / expected).sum() < 60  # chi-square of 23 degrees: 60 is one in 30,000


def test_epoch__pools_mix_as_a_full_shuffle_does() -> None:
    """Labels come sorted, as image folders do: with the default pool a batch must still hold nearly all of them."""
    classes, batch = 100, 256
    order = SampleOrder([100] * 512, num_lanes=128)
    labels = np.arange(order.num_samples) * classes // order.num_samples
    full = np.random.default_rng(0).permutation(order.num_samples)
    assert entropy(labels[order.take(0, order.num_samples)], batch) > 0.95 * entropy(labels[full], batch)


def entropy(labels: np.ndarray, batch: int) -> float:
    """Mean entropy, in bits, of the labels of a batch."""
    shares = [np.bincount(part) / batch for part in labels[: len(labels) // batch * batch].reshape(-1, batch)]
    return float(np.mean([-(share[share > 0] * np.log2(share[share > 0])).sum() for share in shares]))


@settings(max_examples=20)
@given(st.integers(-3, -1))
def test_order__refuses_values_out_of_range_by_name(value: int) -> None:
    for name in ("seed", "shuffle_shards", "num_lanes"):
        with pytest.raises(DataError, match=f"{name}={value}"):
            SampleOrder([4], **{name: value})


@pytest.mark.parametrize("sizes", [[], [0, 0]])
def test_order__refuses_an_empty_split(sizes: list[int]) -> None:
    with pytest.raises(DataError, match="no samples"):
        SampleOrder(sizes)


@pytest.mark.parametrize(
    ("batch_size", "rank", "world", "seen", "words"),
    [(3, 0, 4, 0, "batch_size=3"), (8, 4, 4, 0, "rank=4"), (8, -1, 4, 0, "rank=-1"), (8, 0, 1, -2, "samples_seen=-2")],
)
def test_sampler__refuses_what_cannot_work(batch_size: int, rank: int, world: int, seen: int, words: str) -> None:
    with pytest.raises(DataError, match=words):
        ElasticSampler(SampleOrder([9]), batch_size, rank, world, seen)


@given(orders(), st.integers(1, 30), st.integers(1, 4), st.integers(0, 40))
def test_positions__are_those_of_the_batches(order: SampleOrder, batch: int, world: int, start: int) -> None:
    sampler = ElasticSampler(order, max(batch, world), world - 1, world, start)
    for number, indexes in enumerate(itertools.islice(sampler, 3)):
        positions = sampler.positions(number)
        assert [int(order.take(p, p + 1)[0]) for p in positions.tolist()] == indexes


@given(orders(), st.integers(0, 200))
def test_following__walks_along_a_lane_and_then_into_the_next_epoch(order: SampleOrder, start: int) -> None:
    size, position = order.num_samples, start
    for _ in range(size):
        after = order.following(position)
        assert order.lanes(after, after + 1) == order.lanes(position, position + 1)
        assert after - position == order.num_lanes or after // size == position // size + 1
        position = after
