"""Fetches the shards of the batches to come while earlier ones are trained on.

The batches are looked at in their order, as far ahead as their shards fit into this rank's share of the cache: what
is fetched ahead must not push out what is read now. Threads then bring those shards into the cache; whoever decodes
finds them there, or waits for the download under way. Nothing else depends on them: without them, reading fetches.
"""

from __future__ import annotations

import os
import queue
import threading
from collections import Counter, deque
from collections.abc import Iterable
from copy import copy

from data_pipeline.cache import ShardCache
from data_pipeline.errors import StoreError
from data_pipeline.shards import ShardReader

THREADS = 2
MOST_BATCHES = 256  # looked ahead
STRIDE = 4  # batches looked at while one is used, so that the view widens without a pause


class Prefetcher:
    """Prefetching for one pass over `batches`; `advance` before each batch is used, `close` at the end.

    Args:
        reader: of the data set; it must have a cache.
        batches: of dataset indexes, as this rank will read them.
        samples_ahead: how many samples of this rank to look ahead at most; a part of an epoch.
        share: of the cache that the shards ahead may take.
    """

    def __init__(self, reader: ShardReader, batches: Iterable[list[int]], samples_ahead: int, share: float):
        assert reader.cache is not None
        self.reader = reader
        self.room = share * reader.cache.limit
        self.samples_ahead = samples_ahead
        self._batches = iter(batches)
        self._ahead: deque[tuple[list[int], int]] = deque()  # shards and number of samples of each batch
        self._samples = 0
        self._wanted: Counter[int] = Counter()  # batches ahead that need a shard
        self._bytes = 0  # of the shards in `_wanted`
        self._reported = 0
        self._jobs: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._failure: BaseException | None = None
        self._closed = threading.Event()
        self._caches = [copy(reader.cache) for _ in range(THREADS)]  # each with its own counts
        self._threads = [threading.Thread(target=self._work, args=(cache,), daemon=True) for cache in self._caches]
        for thread in self._threads:
            thread.start()

    def advance(self) -> int:
        """A batch is about to be used: look further ahead. Returns the bytes fetched since the last call.

        Raises:
            DataError: a shard ahead is gone or damaged at the store, or the cache's disk failed.
        """
        if self._failure is not None:
            raise self._failure
        for _ in range(STRIDE):
            if not self._look_further():
                break
        if self._ahead:
            shards, num_samples = self._ahead.popleft()
            self._samples -= num_samples
            for number in shards:
                self._wanted[number] -= 1
                if not self._wanted[number]:
                    del self._wanted[number]
                    self._bytes -= self.reader.split.shards[number].bytes
        before, self._reported = self._reported, sum(cache.fetched_bytes for cache in self._caches)
        return self._reported - before

    def close(self) -> None:
        """Fetch nothing more; a download under way ends by itself."""
        self._closed.set()
        for _ in self._threads:
            self._jobs.put(None)

    def _look_further(self) -> bool:
        full = self._bytes >= self.room or self._samples >= self.samples_ahead or len(self._ahead) >= MOST_BATCHES
        batch = None if full and self._ahead else next(self._batches, None)
        if batch is None:
            return False
        shards = self.reader.shards_of(batch)
        self._ahead.append((shards, len(batch)))
        self._samples += len(batch)
        for number in shards:
            if not self._wanted[number]:
                self._bytes += self.reader.split.shards[number].bytes
                self._jobs.put(number)
            self._wanted[number] += 1
        return True

    def _work(self, cache: ShardCache) -> None:
        while (number := self._jobs.get()) is not None and not self._closed.is_set():
            try:
                cache.fetch(self.reader.root, self.reader.split.shards[number])
            except StoreError:
                # The store may be back before the shard is needed; if not, its reader reports it by name.
                continue
            except BaseException as error:
                self._failure = error
                return


def local_share(world: int) -> float:
    """The part of a node's cache for shards ahead of one rank: all ranks on the node together take half of it."""
    return 0.5 / int(os.environ.get("LOCAL_WORLD_SIZE", world))
