"""From shards to batches of canvases: read, decode, collate, in torch's DataLoader.

A canvas is an image squashed to a square of `canvas_size` pixels, uint8; its true aspect travels along, and crops
are drawn in the true image's proportions. All that follows decoding is batched on the device (`views`). Worker
processes only decode: the order comes from the sampler, so their number changes nothing.

A sample that cannot be used (its image does not decode, is too large or missing, its JSON is damaged) does not end a
training run: the next sample of its lane that can takes its place, on the rank that met it alone, so that order and
other ranks stay as they are and a resumed run does the same. In evaluation it is left out. `Quarantine` names each in
a file, and ends the run when they are too many. A damaged shard is another matter: it is fetched again, and ends the
run by its name if that does not help.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data_pipeline.cache import ShardCache
from data_pipeline.decoding import decode_canvas
from data_pipeline.errors import DataError, SampleError
from data_pipeline.in_hand import Board
from data_pipeline.manifest import Manifest
from data_pipeline.order import ElasticSampler, SampleOrder
from data_pipeline.prefetch import Prefetcher, local_share
from data_pipeline.quarantine import BadSample, Quarantine
from data_pipeline.shards import IMAGE_EXTENSIONS, ShardReader, facts_of
from data_pipeline.shared_memory import fault_of_processes, move_to_shared_memory

MOST_IN_A_ROW = 10  # bad samples that follow each other in a lane


class CanvasBatch(NamedTuple):
    """A batch of N decoded images."""

    canvas: Tensor  # (N, 3, S, S) uint8 RGB
    aspect: Tensor  # (N,) float32, width / height of the source image
    label: Tensor  # (N,) int64, -1 where there is none
    index: Tensor  # type: ignore[assignment]  # (N,) int64 dataset index; hides tuple.index


class Canvas(NamedTuple):
    """One decoded image: (3, S, S) uint8 RGB, aspect, label, dataset index."""

    pixels: Tensor
    aspect: float
    label: int
    index: int  # type: ignore[assignment]  # hides tuple.index


class Delivery(NamedTuple):
    """What a process that decodes hands over; a tuple, so that its tensors can be pinned."""

    batch: CanvasBatch | None  # with black canvases in the places of bad samples
    bad: list[tuple[int, BadSample]]  # place in the batch
    read_bytes: int
    fetched_bytes: int
    error: DataError | None  # travels as a value: DataLoader would put a traceback into its one line


class CanvasDataset(Dataset[Canvas]):
    """Map-style data set over the shards of one split; items are `Canvas`."""

    def __init__(self, root: str | Path, split: str, canvas_size: int, cache: ShardCache | None = None):
        if canvas_size < 1:
            raise DataError(f"canvas_size={canvas_size} is impossible; it must be at least 1")
        self.reader = ShardReader(root, Manifest.load(root).split(split), cache)
        self.canvas_size = canvas_size

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> Canvas:
        """Read and decode one sample.

        Raises:
            SampleError: the sample cannot be used.
            DataError: its shard cannot be read.
        """
        canvas = self._canvas(index)
        if isinstance(canvas, BadSample):
            raise SampleError(f"{self.reader.root}: sample {canvas.key}: {canvas.reason}")
        return canvas

    def __getitems__(self, indexes: list[int]) -> Delivery:
        """A batch for DataLoader, complete but for errors and bad samples, which `CanvasLoader` sees to."""
        reader, cache = self.reader, self.reader.cache
        before = reader.read_bytes, cache.fetched_bytes if cache else 0
        batch, bad, failure = None, [], None
        try:
            canvases = []
            for place, index in enumerate(indexes):
                canvas = self._canvas(index)
                if isinstance(canvas, BadSample):
                    bad.append((place, canvas))
                    black = torch.zeros(3, self.canvas_size, self.canvas_size, dtype=torch.uint8)
                    canvas = Canvas(black, 1.0, -1, index)
                canvases.append(canvas)
            batch = collate(canvases)
        except DataError as error:
            failure = error
        after = reader.read_bytes, cache.fetched_bytes if cache else 0
        return Delivery(batch, bad, after[0] - before[0], after[1] - before[1], failure)

    def _canvas(self, index: int) -> Canvas | BadSample:
        sample = self.reader.read(index)
        try:
            image = next((sample[extension] for extension in IMAGE_EXTENSIONS if extension in sample), None)
            if image is None:
                raise SampleError("has no image; build the data set again")
            pixels, aspect = decode_canvas(image, self.canvas_size)
            label = _label(sample)
        except SampleError as error:
            shard = self.reader.split.shards[self.reader.locate(index)[0]]
            return BadSample(index, sample["__key__"], shard.name, str(error))
        return Canvas(pixels, aspect, label, index)


def _label(sample: dict[str, Any]) -> int:
    try:
        label = facts_of(sample).get("label")
        return -1 if label is None else int(label)
    except DataError as error:
        raise SampleError(str(error)) from error
    except (ValueError, TypeError) as error:
        raise SampleError(f"its JSON is damaged ({error}); build the data set again") from error


def collate(samples: list[Canvas]) -> CanvasBatch:
    """Stack canvases to (N, 3, S, S)."""
    return CanvasBatch(
        torch.stack([sample.pixels for sample in samples]),
        torch.tensor([sample.aspect for sample in samples], dtype=torch.float32),
        torch.tensor([sample.label for sample in samples], dtype=torch.int64),
        torch.tensor([sample.index for sample in samples], dtype=torch.int64),
    )


class CanvasLoader(DataLoader[CanvasBatch]):
    """A DataLoader of `CanvasBatch`; it fetches shards ahead and puts other samples in the places of bad ones.

    Args:
        dataset, batches, num_workers: as for DataLoader.
        quarantine: where bad samples are counted.
        replacements: the dataset indexes to try, one after the other, in the place (batch, place in it) of a bad
            sample; without it bad samples are left out.
        samples_ahead, cache_share: see `Prefetcher`.

    Attributes:
        read_bytes, fetched_bytes: of samples read, and of shards fetched from the store, by this rank's processes.

    Raises:
        DataError: when iterated; always one line, also where a worker process raised it.
    """

    def __init__(
        self,
        dataset: CanvasDataset,
        batches: ElasticSampler | Sequence[list[int]],
        num_workers: int,
        quarantine: Quarantine,
        replacements: Callable[[int, int], Iterator[int]] | None = None,
        samples_ahead: int = 0,
        cache_share: float = 0.5,
    ):
        if num_workers < 0:
            raise DataError(f"num_workers={num_workers} is impossible; 0 decodes in the process itself")
        super().__init__(
            dataset,  # type: ignore[arg-type]  # its batches come collated
            batch_sampler=batches,
            collate_fn=_handed_over,  # type: ignore[arg-type]
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=partial(begin_worker, board := Board(max(num_workers, 1))),
        )
        self.board = board
        self.canvases, self.batches, self.quarantine, self.replacements = dataset, batches, quarantine, replacements
        self.samples_ahead, self.cache_share = samples_ahead, cache_share
        self.read_bytes = self.fetched_bytes = 0

    def __iter__(self) -> Iterator[CanvasBatch]:  # type: ignore[override]
        deliveries: Any = None
        empty = True
        try:
            deliveries = super().__iter__()  # forks the workers, before there are threads
            with self._prefetching() as prefetcher:
                for number in itertools.count():
                    if prefetcher is not None:
                        self.fetched_bytes += prefetcher.advance()
                    delivery: Any = next(deliveries, None)
                    if delivery is None:
                        break
                    batch = self._mended(number, delivery)
                    if batch is not None:
                        empty = False
                        yield batch
            if empty and (bad := self.quarantine.bad):
                sample = next(iter(bad.values()))
                raise DataError(
                    f"{self.canvases.reader.root}: no sample can be used, the first, {sample.key}: {sample.reason}"
                )
            return
        except DataError as error:
            failure = error
        except (RuntimeError, OSError) as error:
            if (told := fault_of_processes(error, self.board)) is None:
                raise
            failure = told
        # Let go of the workers first: the error's traceback would keep them until it is collected.
        self._iterator = None
        del deliveries
        raise failure

    def _prefetching(self) -> Any:
        if self.canvases.reader.cache is None:
            return nullcontext()
        return closing(Prefetcher(self.canvases.reader, self.batches, self.samples_ahead, self.cache_share))

    def _mended(self, number: int, delivery: Delivery) -> CanvasBatch | None:
        """The batch of a delivery, without bad samples; None where nothing is left. Raises the worker's DataError."""
        batch = self._opened(delivery)
        self.quarantine.read(len(batch.label))
        for _, sample in delivery.bad:
            self.quarantine.add(sample)
        if self.replacements is None:
            bad = {place for place, _ in delivery.bad}
            good = [place for place in range(len(batch.label)) if place not in bad]
            if not bad:
                return batch
            return CanvasBatch(*(part[good] for part in batch)) if good else None
        for place, _ in delivery.bad:
            single = self._replacement(self.replacements(number, place), delivery.bad)
            for part, new in zip(batch, single, strict=True):
                part[place] = new[0]
        return batch

    def _replacement(self, indexes: Iterator[int], bad: list[tuple[int, BadSample]]) -> CanvasBatch:
        """A batch of one: the first of `indexes` that can be used."""
        for index, _ in zip(indexes, range(MOST_IN_A_ROW), strict=False):
            delivery = self.canvases.__getitems__([index])
            single = self._opened(delivery)
            self.quarantine.read(1)
            if not delivery.bad:
                return single
            self.quarantine.add(delivery.bad[0][1])
        sample = bad[0][1]
        raise DataError(
            f"{self.canvases.reader.root}: {MOST_IN_A_ROW} samples in a row cannot be used, from {sample.key} "
            f"({sample.shard}): {sample.reason}; build the data set again"
        )

    def _opened(self, delivery: Delivery) -> CanvasBatch:
        self.read_bytes += delivery.read_bytes
        self.fetched_bytes += delivery.fetched_bytes
        if delivery.error is not None:
            raise delivery.error
        assert delivery.batch is not None
        return delivery.batch


def train_loader(
    root: str | Path,
    split: str = "train",
    *,
    canvas_size: int,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    num_workers: int = 0,
    seed: int = 0,
    samples_seen: int = 0,
    shuffle_shards: int = 16,
    num_lanes: int = 128,
    cache: ShardCache | None = None,
    quarantine: str | Path | None = None,
) -> CanvasLoader:
    """This rank's batches without end, from position `samples_seen` of the order; `batch_size` is global.

    Args:
        root: folder or URL.
        cache: of the shards of a URL; one in the default place if not given.
        quarantine: folder whose quarantine.jsonl names bad samples.

    Raises:
        DataError: the batch is larger than the data set, or too small for `world` ranks.
    """
    dataset = CanvasDataset(root, split, canvas_size, cache)
    if batch_size > len(dataset):
        raise DataError(
            f"{root}: batch_size={batch_size} is larger than the {len(dataset)} samples of split {split!r}; "
            f"use at most {len(dataset)}"
        )
    order = SampleOrder(dataset.reader.split.shard_sizes, seed, shuffle_shards, num_lanes)
    sampler = ElasticSampler(order, batch_size, rank, world, samples_seen)

    def replacements(batch: int, place: int) -> Iterator[int]:
        position = int(sampler.positions(batch)[place])
        while True:
            position = order.following(position)
            yield int(order.take(position, position + 1)[0])

    return CanvasLoader(
        dataset,
        sampler,
        num_workers,
        Quarantine(quarantine, split, rank),
        replacements,
        # The order keeps the lists of two epochs: looking further would make them again and again.
        samples_ahead=len(dataset) // world,
        cache_share=local_share(world),
    )


def eval_loader(
    root: str | Path,
    split: str = "val",
    *,
    canvas_size: int,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    num_workers: int = 0,
    limit: int | None = None,
    cache: ShardCache | None = None,
    quarantine: str | Path | None = None,
) -> CanvasLoader:
    """Each sample of the split once, in order, or `limit` of them spread evenly; rank r takes every world-th.

    `batch_size` is this rank's; the last batch may be smaller, and so is one with bad samples, which are left out.
    `root`, `cache`, `quarantine` as for `train_loader`.
    """
    dataset = CanvasDataset(root, split, canvas_size, cache)
    if batch_size < 1:
        raise DataError(f"batch_size={batch_size} is impossible; it must be at least 1")
    count = len(dataset) if limit is None else min(limit, len(dataset))
    # Spread, because image folders come class by class.
    indexes = (np.arange(count) * len(dataset) // max(count, 1))[rank::world].tolist()
    batches = [indexes[first : first + batch_size] for first in range(0, len(indexes), batch_size)]
    return CanvasLoader(
        dataset,
        batches,
        num_workers,
        Quarantine(quarantine, split, rank),
        samples_ahead=len(indexes),
        cache_share=local_share(world),
    )


def _handed_over(delivery: Delivery) -> Delivery:
    try:
        move_to_shared_memory(delivery.batch)
    except DataError as error:
        return delivery._replace(batch=None, error=error)
    return delivery


def begin_worker(board: Board, _: int) -> None:
    """What a worker process begins with."""
    board.join()
    # A worker is one thread by design; OpenCV's pool also does not survive the fork that made the worker.
    cv2.setNumThreads(0)
