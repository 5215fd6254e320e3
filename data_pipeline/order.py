"""Who reads which sample when: an order that depends on the data set and the seed alone.

The order is an infinite sequence of dataset indexes, epoch after epoch, each sample exactly once an epoch. It is a
pure function of (shard sizes, seed, shuffle_shards, num_lanes): neither the number of ranks, nor of workers,
nor the batch size enters, so a run can stop on eight machines and go on with three, and its whole state is one
integer, the number of samples seen.

An epoch is made in two steps. First a list: shards are permuted and joined, and samples permuted inside pools of at
most `shuffle_shards` shards' worth, which mixes well while few shards are open at a time. Then lanes: the list is cut
into `num_lanes` contiguous chunks and read across them, position p being item p // num_lanes of lane p % num_lanes.
A batch therefore touches all lanes, while a rank, given a block of neighbouring lanes, needs only their shards. Pools
end where lanes end, not where shards do: or a rank whose first lane began a little before a pool's end would need
nearly all shards of that pool as well.

    list of the epoch   | a b c d | e f g | h i j |        10 samples, 3 lanes
    order               a e h  b f i  c g j  d

No list is ever made. The permutations are those of a keyed Feistel network, so that the sample at any position is
computed by itself: a run of a thousand million samples resumes in its last epoch as fast as at its first step, in
memory that follows the number of shards. Only integer arithmetic enters, which no library's next version changes.

Sources: Feistel networks as permutations (Luby, Rackoff 1988), of any size by walking along cycles (Black, Rogaway
2002); the round function is SplitMix64's finalizer (Steele, Lea, Flood 2014).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from data_pipeline.errors import DataError

# An epoch's shards are kept while it is read, with those of its successor for batches that run across the end.
KEPT_EPOCHS = 2
ROUNDS = 16
GOLDEN = np.array([0x9E3779B97F4A7C15], np.uint64)  # 2^64 over the golden ratio: SplitMix64's step


class SampleOrder:
    """The infinite order of samples. Memory: some 50 bytes a shard, nothing a sample.

    Args:
        shard_sizes: samples in each shard; dataset indexes count through them (shard-major).
        seed: of all permutations, 0 or more.
        shuffle_shards: the most shards' worth of samples in a pool; 0 keeps the order on disk.
        num_lanes: contiguous chunks that an epoch's list is cut into; a data set with fewer samples has as many
            lanes as samples.

    Raises:
        DataError: no samples, or a value out of range.
    """

    def __init__(self, shard_sizes: Sequence[int], seed: int = 0, shuffle_shards: int = 16, num_lanes: int = 128):
        for name, value, least in (("seed", seed, 0), ("shuffle_shards", shuffle_shards, 0),
                                   ("num_lanes", num_lanes, 1)):  # fmt: skip
            if value < least:
                raise DataError(f"{name}={value} is impossible; it must be at least {least}")
        self.shard_sizes = np.asarray(shard_sizes, dtype=np.int64)
        self.seed, self.shuffle_shards = seed, shuffle_shards
        self.num_samples = int(self.shard_sizes.sum())
        if self.num_samples < 1 or self.shard_sizes.min() < 0:
            raise DataError("the split has no samples; build a data set with at least one image")
        self.num_lanes = min(num_lanes, self.num_samples)
        self._starts = np.concatenate([[0], np.cumsum(self.shard_sizes)])
        self._bounds = self._pool_bounds()
        self._plans: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()

    def take(self, start: int, stop: int) -> np.ndarray:
        """Dataset index (int64) at each global position start..stop-1; positions run on across epochs.

        Costs the permutation of an epoch's shards where it is not at hand, whatever the position: nothing is
        replayed.
        """
        epochs, within = np.divmod(np.arange(start, stop, dtype=np.int64), self.num_samples)
        indexes = np.empty_like(within)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            indexes[chosen] = self._listed(int(epoch), self._list_positions(within[chosen]))
        return indexes

    def lanes(self, start: int, stop: int) -> np.ndarray:
        """Lane (int64) of each global position start..stop-1."""
        return np.arange(start, stop, dtype=np.int64) % self.num_samples % self.num_lanes

    def epoch(self, epoch: int) -> np.ndarray:
        """The list of epoch `epoch` before it is cut into lanes: a permutation of all dataset indexes."""
        return self._listed(epoch, np.arange(self.num_samples, dtype=np.int64))

    def _listed(self, epoch: int, places: np.ndarray) -> np.ndarray:
        """Dataset index at each of `places` (int64) of an epoch's list."""
        if self.shuffle_shards == 0:
            return places
        shards, starts = self._plan(epoch)
        pools = np.searchsorted(self._bounds, places, side="right") - 1
        first = self._bounds[pools]
        sizes, keys = self._bounds[pools + 1] - first, _key(self.seed, epoch, pools + 1)
        shuffled = first + permute(places - first, sizes, keys)
        turn = np.searchsorted(starts, shuffled, side="right") - 1
        return self._starts[shards[turn]] + shuffled - starts[turn]

    def _pool_bounds(self) -> np.ndarray:
        """Where pools begin in an epoch's list, and its end: every so many lanes, or so many times within each lane."""
        lanes = self._list_positions(np.arange(self.num_lanes))
        in_a_lane = np.count_nonzero(self.shard_sizes) / self.num_lanes  # shards
        if in_a_lane <= self.shuffle_shards:
            # A divisor if there is a large one, so that pools also end where equal blocks of lanes do.
            most = int(min(self.shuffle_shards / in_a_lane, self.num_lanes))
            step = next((step for step in range(most, most // 2, -1) if self.num_lanes % step == 0), most)
            return np.append(lanes[::step], self.num_samples)
        pieces = math.ceil(in_a_lane / max(self.shuffle_shards, 1))
        lengths = np.diff(np.append(lanes, self.num_samples))
        return np.append((lanes[:, None] + lengths[:, None] * np.arange(pieces) // pieces).ravel(), self.num_samples)

    def _plan(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Shards in the order of an epoch, and where each begins in its list; the list's end behind them."""
        if epoch not in self._plans:
            count = len(self.shard_sizes)
            turns = np.arange(count, dtype=np.int64)
            shards = permute(
                turns, np.full_like(turns, count), np.full(count, _key(self.seed, epoch, np.zeros(1, int)))
            )
            self._plans[epoch] = shards, np.concatenate([[0], np.cumsum(self.shard_sizes[shards])])
            if len(self._plans) > KEPT_EPOCHS:
                self._plans.popitem(last=False)
        self._plans.move_to_end(epoch)
        return self._plans[epoch]

    def _list_positions(self, within: np.ndarray) -> np.ndarray:
        """Place in the epoch's list of position p of the epoch: item p // num_lanes of lane p % num_lanes.

        The first `longer` lanes hold one item more than the others: reading across, the last, unfinished row
        then ends at a lane's last item, and no lane is empty before its turn.
        """
        shorter, longer = divmod(self.num_samples, self.num_lanes)
        item, lane = np.divmod(within, self.num_lanes)
        return lane * shorter + np.minimum(lane, longer) + item

    def following(self, position: int) -> int:
        """Global position of the next item of the lane of `position`; after the epoch's last, the next epoch's first.

        What stands in for a sample that cannot be used: of the same lane, so mostly of the same shards.
        """
        epoch, within = divmod(position, self.num_samples)
        if within + self.num_lanes < self.num_samples:
            return position + self.num_lanes
        return (epoch + 1) * self.num_samples + within % self.num_lanes


class ElasticSampler(Sampler[list[int]]):
    """This rank's batches of a `SampleOrder`, without end: a batch sampler for torch's DataLoader.

    A global batch is the next `global_batch` positions, sorted by lane and cut into `world` equal blocks, so
    that a rank keeps to its few lanes and their shards. The sampler itself does not move: a loader fetches
    ahead, so only the caller knows which batches were used, and a new iteration starts at `samples_seen` again.

    Args:
        order: the order to follow.
        batch_size: wanted over all ranks; what `world` does not divide is left to the next batch.
        rank, world: which block is ours.
        samples_seen: position to start from; advance it by `global_batch` a step to resume.

    Raises:
        DataError: a batch smaller than the number of ranks, a rank outside the world, a negative position.
    """

    def __init__(self, order: SampleOrder, batch_size: int, rank: int, world: int, samples_seen: int = 0):
        if not 0 <= rank < world:
            raise DataError(f"rank={rank} is outside a world of {world}")
        if batch_size < world:
            raise DataError(f"batch_size={batch_size} is too small for {world} workers; use at least {world}")
        if samples_seen < 0:
            raise DataError(f"samples_seen={samples_seen} is impossible; it must be at least 0")
        self.order, self.rank, self.world, self.samples_seen = order, rank, world, samples_seen
        self.local_batch = batch_size // world
        self.global_batch = self.local_batch * world

    def __iter__(self) -> Iterator[list[int]]:
        start = self.samples_seen
        ours = slice(self.rank * self.local_batch, (self.rank + 1) * self.local_batch)
        while True:
            stop = start + self.global_batch
            by_lane = np.argsort(self.order.lanes(start, stop), kind="stable")
            yield self.order.take(start, stop)[by_lane[ours]].tolist()
            start = stop

    def positions(self, batch: int) -> np.ndarray:
        """Global position (int64) of each sample of the batch that `__iter__` yields after `batch` others."""
        start = self.samples_seen + batch * self.global_batch
        by_lane = np.argsort(self.order.lanes(start, start + self.global_batch), kind="stable")
        return start + by_lane[self.rank * self.local_batch : (self.rank + 1) * self.local_batch]


def permute(items: np.ndarray, sizes: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Where each of `items` (int64, 0..size-1) goes in a random permutation of its `size` items.

    Args:
        sizes: (int64, below 2^53) of the permutation that each item is part of.
        keys: (uint64) of that permutation.
    """
    bits = np.frexp((sizes - 1).astype(np.float64))[1].astype(np.uint64)
    low_bits = (bits + np.uint64(1)) // np.uint64(2)
    low_mask, high_mask = (((np.uint64(1) << width) - np.uint64(1)) for width in (low_bits, bits - low_bits))
    # The network permutes the next power of two. Whoever lands outside goes on along its cycle, which leads back in.
    where, outside = items.astype(np.uint64), np.flatnonzero(sizes > 1)
    while len(outside):
        high, low = where[outside] >> low_bits[outside], where[outside] & low_mask[outside]
        for number in np.arange(ROUNDS, dtype=np.uint64):
            round_keys = keys[outside] + number * GOLDEN
            if number % np.uint64(2):
                low ^= _mix(high ^ round_keys) & low_mask[outside]
            else:
                high ^= _mix(low ^ round_keys) & high_mask[outside]
        where[outside] = (high << low_bits[outside]) | low
        outside = outside[where[outside] >= sizes[outside].astype(np.uint64)]
    return where.astype(np.int64)


def _key(seed: int, epoch: int, numbers: np.ndarray) -> np.ndarray:
    """A key (uint64) for each of `numbers` in an epoch."""
    key = np.zeros(1, np.uint64)
    for part in (np.array([seed]), np.array([epoch]), numbers):
        key = _mix(key + (part.astype(np.uint64) + np.uint64(1)) * GOLDEN)
    return key


def _mix(values: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64: every bit of uint64 values depends on every other."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
