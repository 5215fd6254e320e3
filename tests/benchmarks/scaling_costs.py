"""What a training step, an epoch's shards and a failure cost on a cluster of GPUs: formulas and a simulated cache.

`Inputs` says what the machines are taken to be, `StageCounts` what a step asks of them; all else is arithmetic. A step
comes out as its parts in seconds (`Step`), shards as shares of a data set, failures as a share of time.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scaling_counts import StageCounts

from data_pipeline.order import ElasticSampler, SampleOrder

DAY, MIB, GIB = 86400.0, 2**20, 2**30
FIRST_BUCKET, BUCKET = MIB, 25 * MIB  # bytes of gradients that DDP reduces at once
BATCH = 256  # where the order is simulated; a node's part of it is what counts
REDUCED_SHARD = 8  # samples of a shard where whole epochs are simulated: what is counted then is whole shards
WINDOW = 100  # batches of a simulation at full size


@dataclass(frozen=True)
class Inputs:
    """What the model is told; bytes, seconds and FLOP/s. Sources are in docs/scaling.md."""

    # Assumed: a node of eight A100 with one network card of 200 Gbit/s.
    peak_flops: float = 312e12  # of a GPU, bf16, dense
    utilisation_low: float = 0.30  # of the peak
    utilisation_high: float = 0.45
    launch: float = 5e-6  # the host's time for an operator
    gpus_per_node: int = 8
    gpu_memory: float = 80e9
    intra_bandwidth: float = 240e9  # of a ring inside a node
    inter_bandwidth: float = 25e9  # of a node
    intra_latency: float = 1.5e-6  # of a hop
    inter_latency: float = 5e-6
    device_to_host: float = 10e9
    cpus_per_gpu: float = 6  # the recipe's num_workers
    storage_node: float = 5e9  # bytes a second to one node
    storage_total: float = 10e9  # to all nodes
    node_failures: float = 1 / (30 * DAY)  # of a node, a second
    # Of the data set: ImageNet-1k by the defaults of `dicm data build`.
    num_images: int = 1_281_167
    shard_samples: int = 1000
    # Measured.
    sample_bytes: float = 119_300.0  # in a shard
    decode: float = 1 / 515  # of an image, on one core
    control_hop: float = 318e-6  # a number from rank to rank through gloo
    checkpoint_write: float = 0.36e9  # bytes a second from one process, hashing and fsync included
    restart: float = 13.0  # from a killed node to the next step, without reading the checkpoint: recovery.py
    # What could be changed; see `changes`.
    exchange: bool = False  # shuffle keys by sending each image to its one new place

    @property
    def num_shards(self) -> int:
        """Of the data set."""
        return math.ceil(self.num_images / self.shard_samples)

    @property
    def shard_bytes(self) -> float:
        """Of one shard."""
        return self.shard_samples * self.sample_bytes


# Collectives


def ring(world: int, inputs: Inputs) -> tuple[float, float]:
    """Seconds for the world - 1 hops of a ring through all GPUs, and the bandwidth of its narrowest link."""
    nodes = math.ceil(world / inputs.gpus_per_node)
    crossings = min(nodes, world - 1) if nodes > 1 else 0
    hops = crossings * inputs.inter_latency + (world - 1 - crossings) * inputs.intra_latency
    return hops, min(inputs.intra_bandwidth, inputs.inter_bandwidth) if crossings else inputs.intra_bandwidth


def ring_all_reduce(size: float, world: int, inputs: Inputs) -> float:
    """Reduce-scatter and all-gather: 2 (world - 1) steps of size / world bytes."""
    hops, bandwidth = ring(world, inputs)
    return 2 * hops + 2 * (world - 1) / world * size / bandwidth


def tree_all_reduce(size: float, world: int, inputs: Inputs) -> float:
    """Up and down a binary tree of nodes, pipelined."""
    depth = math.ceil(math.log2(max(world / inputs.gpus_per_node, 1)))
    inside = min(world, inputs.gpus_per_node) - 1
    return 2 * (depth * inputs.inter_latency + inside * inputs.intra_latency) + 2 * size / ring(world, inputs)[1]


def all_reduce(size: float, world: int, inputs: Inputs) -> float:
    """The faster of ring and tree, as NCCL chooses."""
    return min(ring_all_reduce(size, world, inputs), tree_all_reduce(size, world, inputs))


def all_gather(size: float, world: int, inputs: Inputs) -> float:
    """Every rank gets `size` bytes, its own part included."""
    hops, bandwidth = ring(world, inputs)
    return hops + (world - 1) / world * size / bandwidth


def broadcast(size: float, world: int, inputs: Inputs) -> float:
    """Along a ring, pipelined."""
    hops, bandwidth = ring(world, inputs)
    return hops + size / bandwidth


def all_to_all(size: float, world: int, inputs: Inputs) -> float:
    """Every rank sends `size` bytes, spread evenly over all: what leaves a node shares its network card."""
    away = 1 - inputs.gpus_per_node / world if world > inputs.gpus_per_node else 0.0
    inside = size * (1 - away) / inputs.intra_bandwidth
    return (world - 1) * inputs.intra_latency + inside + away * size * inputs.gpus_per_node / inputs.inter_bandwidth


def exposed(gradients: Sequence[tuple[float, int]], backward: float, reduce: Callable[[float], float]) -> float:
    """Seconds of reducing gradients that the backward pass does not hide: buckets one after the other, when ready."""
    end = size = 0.0
    limit = FIRST_BUCKET
    for number, (share, num_bytes) in enumerate(gradients, start=1):
        size += num_bytes
        if size >= limit or number == len(gradients):
            end = max(end, share * backward) + reduce(size)
            size, limit = 0.0, BUCKET
    return max(0.0, end - backward)


def sharded_optimizer(counts: StageCounts, world: int, inputs: Inputs) -> float:
    """Seconds that OSS takes to send the new weights, one broadcast from each rank, none beside another."""
    return world * broadcast(4 * counts.num_parameters / world, world, inputs)


# A step


@dataclass(frozen=True)
class Step:
    """Seconds of a step by what they are spent on; `feeds` run beside it and hold it up where they are longer."""

    parts: dict[str, float]
    feeds: dict[str, float]

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        return max(sum(self.parts.values()), *self.feeds.values())

    @property
    def bottleneck(self) -> str:
        """What most of the step is spent on or waited for."""
        name = max(self.feeds, key=self.feeds.__getitem__)
        if self.feeds[name] >= sum(self.parts.values()):
            return name
        return max(self.parts, key=self.parts.__getitem__)


def model_step(counts: StageCounts, world: int, batch: int, inputs: Inputs, utilisation: float, fetched: float) -> Step:
    """A step of `batch` images over `world` GPUs whose nodes fetch `fetched` times the bytes of their images.

    The host queues operators ahead of the GPU, but for MoCo's queue, which it waits for between forward and backward;
    so a step is two stretches, each as long as the longer of host and GPU. While it is computed, the ranks ask each other
    whether to stop; a step takes no less than that.
    """
    local, compute = batch / world, counts.flops * batch / world / (inputs.peak_flops * utilisation)
    launches = counts.launches * inputs.launch
    share = counts.backward_flops / counts.flops
    busy = max(compute, launches)
    reduced = exposed(counts.gradients, busy * share, lambda size: all_reduce(size, world, inputs))
    waited = max(0.0, launches * share - busy * share - reduced)
    if inputs.exchange:
        shuffled = 2 * all_to_all(counts.shuffled_bytes * local / 2, world, inputs)
    else:
        shuffled = 2 * all_gather(counts.shuffled_bytes * batch / 2, world, inputs)
    others = counts.buffer_dtypes * ring(world, inputs)[0] + counts.buffer_bytes / ring(world, inputs)[1]
    if counts.key_bytes:
        others += 3 * all_gather(counts.key_bytes * batch / 3, world, inputs) + 2 * broadcast(8 * batch, world, inputs)
    nodes = math.ceil(world / inputs.gpus_per_node)
    read = batch * inputs.sample_bytes * fetched
    parts = {
        "compute" if compute >= launches else "launches": busy + waited,
        "gradients": reduced,
        "key shuffle": shuffled if counts.shuffled_bytes else 0.0,
        "buffers, keys": others,
    }
    control = math.ceil(math.log2(world)) * inputs.control_hop  # a broadcast along a binomial tree
    return Step(
        {**parts, "stop flag": max(0.0, control - sum(parts.values()))},
        {
            "decoding": local * inputs.decode / inputs.cpus_per_gpu,
            "storage": max(read / nodes / inputs.storage_node, read / inputs.storage_total),
        },
    )


# Data


def shards_touched(nodes: int, inputs: Inputs) -> float:
    """Share of all shards that the ranks of a node read from in an epoch."""
    reader = NodeReader.in_the_middle(nodes, inputs, REDUCED_SHARD, room=1)
    touched: set[int] = set()
    for _ in range(reader.batches_an_epoch):
        touched.update(reader.next_shards())
    return len(touched) / inputs.num_shards


def shards_fetched(nodes: int, inputs: Inputs, cache: float) -> float:
    """Shards that a node fetches in an epoch, over all shards, once its cache of so many bytes is full.

    A shard that a node reads is in use for most of an epoch, so a cache that does not hold all that the node touches
    loses shards before they are done with. How often depends on their samples: that case is simulated at full size.
    """
    room, touched = int(cache / inputs.shard_bytes), shards_touched(nodes, inputs)
    if room >= inputs.num_shards:
        return 0.0
    fits = room >= touched * inputs.num_shards
    reader = NodeReader.in_the_middle(nodes, inputs, REDUCED_SHARD if fits else inputs.shard_samples, room)
    window = reader.batches_an_epoch if fits else WINDOW
    for _ in range(math.ceil(room / (touched * inputs.num_shards) + 1) * window):
        reader.read()
    before = reader.fetched
    for _ in range(window):
        reader.read()
    return (reader.fetched - before) * reader.batches_an_epoch / window / inputs.num_shards


class NodeReader:
    """A node of a world of nodes, reading by `order` through a cache of `room` shards; counts those that it fetches.

    The blocks of its ranks lie side by side, so together they are the block of one rank in a world of nodes.
    """

    def __init__(self, order: SampleOrder, node: int, nodes: int, room: int, batch: int = BATCH):
        self.room, self.fetched = room, 0
        self.batches_an_epoch = order.num_samples // batch
        self._starts = np.cumsum(order.shard_sizes)
        self._batches = iter(ElasticSampler(order, batch, node, nodes))
        self._cached: OrderedDict[int, None] = OrderedDict()

    @classmethod
    def in_the_middle(cls, nodes: int, inputs: Inputs, shard_samples: int, room: int) -> NodeReader:
        """Of the inputs' data set, with so many samples a shard; the last shard is short."""
        last = math.ceil((inputs.num_images / inputs.shard_samples) % 1 * shard_samples) or shard_samples
        order = SampleOrder([shard_samples] * (inputs.num_shards - 1) + [last])
        return cls(order, nodes // 2, nodes, room)

    def next_shards(self) -> list[int]:
        """Of the node's part of the next batch, each sample's."""
        return np.searchsorted(self._starts, next(self._batches), side="right").tolist()

    def read(self) -> None:
        """The next batch; the shard that was used longest ago makes room."""
        for shard in self.next_shards():
            self.fetched += shard not in self._cached
            self._cached[shard] = None
            self._cached.move_to_end(shard)
            if len(self._cached) > self.room:
                self._cached.popitem(last=False)


# Failures


def best_interval(cost: float, between_failures: float) -> float:
    """Seconds of work between checkpoints of `cost` seconds (Young 1974, with Daly's 2006 terms of higher order)."""
    if cost >= 2 * between_failures:
        return between_failures
    x = cost / (2 * between_failures)
    return math.sqrt(2 * cost * between_failures) * (1 + math.sqrt(x) / 3 + x / 9) - cost


def goodput(interval: float, cost: float, between_failures: float, restart: float, delay: float = 0.0) -> float:
    """Share of time that ends up in the result, failures coming at random (Daly 2006).

    Args:
        cost: seconds that training stands still for a checkpoint after each `interval` seconds of work.
        restart: from a failure to the next step.
        delay: until a checkpoint counts, written beside training: as much more is lost with each failure.
    """
    lost, segment = restart + delay, (interval + cost) / between_failures
    return interval / (between_failures * math.exp(lost / between_failures) * math.expm1(segment))
