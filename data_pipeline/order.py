"""Who reads which sample when: an order that depends on the data set and the seed alone.

The order is an infinite sequence of dataset indexes, epoch after epoch, each sample exactly once an epoch. It is a
pure function of (shard sizes, seed, shuffle_shards, num_lanes): neither the number of ranks, nor of workers, nor
the batch size enters, so a run can stop on eight machines and go on with three, and its whole state is one
integer, the number of samples seen.

An epoch is made in two steps. First a list: shards are permuted, joined in pools of `shuffle_shards`, and samples
permuted inside each pool, which mixes well while few shards are open at a time. Then lanes: the list is cut into
`num_lanes` contiguous chunks and read across them, position p being item p // num_lanes of lane p % num_lanes. A
batch therefore touches all lanes, while a rank, given a block of neighbouring lanes, needs only their shards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

# An epoch's list is kept while it is read, with its successor for batches that run across the end.
KEPT_EPOCHS = 2


class SampleOrder:
    """The infinite order of samples.

    Args:
        shard_sizes: samples in each shard; dataset indexes count through them (shard-major).
        seed: of all permutations.
        shuffle_shards: shards in a pool; 0 keeps the order on disk.
        num_lanes: contiguous chunks that an epoch's list is cut into.
    """

    def __init__(self, shard_sizes: Sequence[int], seed: int = 0, shuffle_shards: int = 16, num_lanes: int = 128):
        if num_lanes < 1 or shuffle_shards < 0:
            raise ValueError(f"num_lanes={num_lanes} and shuffle_shards={shuffle_shards} must be positive")
        self.shard_sizes = np.asarray(shard_sizes, dtype=np.int64)
        self.seed, self.shuffle_shards, self.num_lanes = seed, shuffle_shards, num_lanes
        self.num_samples = int(self.shard_sizes.sum())
        if self.num_samples < 1:
            raise ValueError("an order needs at least one sample")
        self._starts = np.concatenate([[0], np.cumsum(self.shard_sizes)])
        self._epochs: dict[int, np.ndarray] = {}

    def take(self, start: int, stop: int) -> np.ndarray:
        """Dataset index (int64) at each global position start..stop-1; positions run on across epochs."""
        positions = np.arange(start, stop, dtype=np.int64)
        epochs, within = np.divmod(positions, self.num_samples)
        indexes = np.empty_like(positions)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            indexes[chosen] = self.epoch(int(epoch))[self._list_positions(within[chosen])]
        return indexes

    def lanes(self, start: int, stop: int) -> np.ndarray:
        """Lane (int64) of each global position start..stop-1."""
        within = np.arange(start, stop, dtype=np.int64) % self.num_samples
        return within % min(self.num_lanes, self.num_samples)

    def epoch(self, epoch: int) -> np.ndarray:
        """The list of epoch `epoch` before it is cut into lanes: a permutation of all dataset indexes."""
        if epoch not in self._epochs:
            self._epochs[epoch] = self._permute(epoch)
            for old in sorted(self._epochs)[:-KEPT_EPOCHS]:
                del self._epochs[old]
        return self._epochs[epoch]

    def _permute(self, epoch: int) -> np.ndarray:
        if self.shuffle_shards == 0:
            return np.arange(self.num_samples, dtype=np.int64)
        generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence((self.seed, epoch))))
        shards = generator.permutation(len(self.shard_sizes))
        pools = []
        for first in range(0, len(shards), self.shuffle_shards):
            members = shards[first : first + self.shuffle_shards]
            pool = np.concatenate([np.arange(self._starts[s], self._starts[s + 1]) for s in members])
            pools.append(generator.permutation(pool))
        return np.concatenate(pools)

    def _list_positions(self, within: np.ndarray) -> np.ndarray:
        """Place in the epoch's list of position p of the epoch: item p // lanes of lane p % lanes.

        Lengths of chunks differ by at most one: the first `longer` lanes hold one item more than the others, which
        is what reading across the lanes until all are empty asks for.
        """
        num_lanes = min(self.num_lanes, self.num_samples)
        shorter, longer = divmod(self.num_samples, num_lanes)
        item, lane = np.divmod(within, num_lanes)
        return lane * shorter + np.minimum(lane, longer) + item


class ElasticSampler(Sampler[list[int]]):
    """This rank's batches of a `SampleOrder`, without end: a batch sampler for torch's DataLoader.

    A global batch is the next (batch_size // world) * world positions, sorted by lane and cut into `world` equal
    blocks, so that a rank keeps to its few lanes and their shards.

    Args:
        order: the order to follow.
        batch_size: global, over all ranks.
        rank, world: which block is ours.
        samples_seen: position to start from.
    """

    def __init__(self, order: SampleOrder, batch_size: int, rank: int, world: int, samples_seen: int = 0):
        if not 0 <= rank < world or batch_size < world:
            raise ValueError(f"batch_size={batch_size} cannot be shared by rank {rank} of {world}")
        self.order, self.rank, self.world, self.samples_seen = order, rank, world, samples_seen
        self.local_batch = batch_size // world

    def __iter__(self) -> Iterator[list[int]]:
        size = self.local_batch * self.world
        position = self.samples_seen
        while True:
            by_lane = np.argsort(self.order.lanes(position, position + size), kind="stable")
            block = by_lane[self.rank * self.local_batch : (self.rank + 1) * self.local_batch]
            yield self.order.take(position, position + size)[block].tolist()
            position += size
