"""Samples one by one, each of its own size: what detectors and segmentation networks read, in lists.

    shards -> survey: which samples serve, and what is left out, counted
           -> training_loader: lists of samples without end, shuffled      once: each sample, in order

The survey (`surveys.py`) looks at annotations before any work starts, so that nothing is first met in the middle of a
run. A picture that then does not decode is named in quarantine.jsonl; in training the next sample of the data set
takes its place, in evaluation it is left out.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from data_pipeline.cache import ShardCache
from data_pipeline.decoding import decode_image
from data_pipeline.errors import DataError, SampleError
from data_pipeline.in_hand import Board
from data_pipeline.loader import MOST_IN_A_ROW, begin_worker
from data_pipeline.manifest import Manifest
from data_pipeline.order import ElasticSampler, SampleOrder
from data_pipeline.quarantine import BadSample, Quarantine
from data_pipeline.shards import IMAGE_EXTENSIONS, ShardReader
from data_pipeline.shared_memory import fault_of_processes, move_to_shared_memory

MIN_SIDE = 16  # pixels; no stream is made of a smaller image

S = TypeVar("S")


def picture_of(sample: dict[str, Any]) -> np.ndarray:
    """The image (H, W, 3) uint8 of a raw sample (SampleError: it has none that decodes)."""
    data = next((sample[extension] for extension in IMAGE_EXTENSIONS if extension in sample), None)
    if data is None:
        raise SampleError("has no image; build the data set again")
    return decode_image(data)


class Draw(NamedTuple):
    """A sample that is asked for."""

    number: int  # among the usable ones
    position: int | None  # in the order of a training; None where each is read once


class Delivery(NamedTuple):
    """What a worker process hands over."""

    samples: list[Any]
    bad: list[BadSample]
    error: DataError | None  # travels as a value: DataLoader would put a traceback into its one line


class SampleDataset(Dataset[S], Generic[S]):
    """The usable samples of a split; subclasses say what a sample is.

    Args:
        usable: dataset indexes, ascending, as `survey` gives them.
        cache: of the shards of a URL.
    """

    def __init__(self, root: str | Path, split: str, usable: np.ndarray, cache: ShardCache | None = None):
        self.root, self.split, self.usable = root, split, usable
        self.reader = ShardReader(root, Manifest.load(root).split(split), cache)

    @abstractmethod
    def load(self, sample: dict[str, Any], index: int, position: int | None) -> S:
        """The sample of a raw one (SampleError: it cannot be used).

        Args:
            index: of the data set.
            position: in the order of a training, of which random draws are to depend; None in evaluation.
        """

    def raw(self, number: int, position: int | None) -> dict[str, Any]:
        """Files of the `number`-th usable sample."""
        return self.reader.read(int(self.usable[number]))

    @property
    def shard_sizes(self) -> list[int]:
        """Usable samples in each shard."""
        bounds = np.cumsum([0, *self.reader.split.shard_sizes])
        return np.histogram(self.usable, bounds)[0].tolist()

    def __len__(self) -> int:
        return len(self.usable)

    def __getitem__(self, number: int) -> S:
        """A sample as evaluation sees it (SampleError: it cannot be used)."""
        sample = self._sample(Draw(number, None))
        if isinstance(sample, BadSample):
            raise SampleError(f"{self.root}: sample {sample.key}: {sample.reason}")
        return sample

    def __getitems__(self, draws: list[Draw]) -> Delivery:
        """A batch for DataLoader, complete but for errors, which `SampleLoader` sees to."""
        samples: list[S] = []
        bad: list[BadSample] = []
        try:
            for draw in draws:
                for _ in range(MOST_IN_A_ROW):
                    sample = self._sample(draw)
                    if not isinstance(sample, BadSample):
                        samples.append(sample)
                        break
                    bad.append(sample)
                    if draw.position is None:
                        break
                    draw = draw._replace(number=(draw.number + 1) % len(self))
                else:
                    raise DataError(
                        f"{self.root}: {MOST_IN_A_ROW} samples in a row cannot be used, the last {bad[-1].key} "
                        f"({bad[-1].shard}): {bad[-1].reason}"
                    )
        except DataError as error:
            return Delivery(samples, bad, error)
        return Delivery(samples, bad, None)

    def _sample(self, draw: Draw) -> S | BadSample:
        raw, index = self.raw(draw.number, draw.position), int(self.usable[draw.number])
        try:
            return self.load(raw, index, draw.position)
        except SampleError as error:
            shard = self.reader.split.shards[self.reader.locate(index)[0]]
            return BadSample(index, raw["__key__"], shard.name, str(error))


class SampleLoader(DataLoader[list[S]]):
    """Batches as lists; a worker's DataError is raised as it was, in one line.

    Args:
        batches: as for DataLoader, lists of `Draw`.
        quarantine: where bad samples are counted.
    """

    def __init__(
        self, dataset: SampleDataset[S], batches: Iterable[list[Draw]], num_workers: int, quarantine: Quarantine
    ):
        super().__init__(
            dataset,  # type: ignore[arg-type]  # `__getitems__` makes whole batches
            batch_sampler=batches,
            collate_fn=_handed_over,  # type: ignore[arg-type]
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            worker_init_fn=partial(begin_worker, board := Board(max(num_workers, 1))),
        )
        self.board = board
        self.quarantine = quarantine

    def __iter__(self) -> Iterator[list[S]]:  # type: ignore[override]
        try:
            for delivery in super().__iter__():
                assert isinstance(delivery, Delivery)
                self.quarantine.read(len(delivery.samples) + len(delivery.bad))
                for sample in delivery.bad:
                    self.quarantine.add(sample)
                if delivery.error is not None:
                    raise delivery.error
                if delivery.samples:
                    yield delivery.samples
            return
        except DataError as error:
            failure = error
        except (RuntimeError, OSError) as error:
            if (told := fault_of_processes(error, self.board)) is None:
                raise
            failure = told
        # Let go of the workers first: the error's traceback would keep them until it is collected.
        self._iterator = None
        raise failure


class _DrawnBatches(Sampler[list[Draw]]):
    """Batches of an `ElasticSampler` with the positions of their samples."""

    def __init__(self, sampler: ElasticSampler):
        self.sampler = sampler

    def __iter__(self) -> Iterator[list[Draw]]:
        for batch, numbers in enumerate(self.sampler):
            places = self.sampler.positions(batch).tolist()
            yield [Draw(number, place) for number, place in zip(numbers, places, strict=True)]


def training_loader(
    dataset: SampleDataset[S],
    *,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    num_workers: int = 0,
    seed: int = 0,
    samples_seen: int = 0,
    quarantine: str | Path | None = None,
) -> SampleLoader[S]:
    """This rank's training batches without end, from position `samples_seen` of the order; `batch_size` is global."""
    sampler = ElasticSampler(SampleOrder(dataset.shard_sizes, seed), batch_size, rank, world, samples_seen)
    return SampleLoader(dataset, _DrawnBatches(sampler), num_workers, Quarantine(quarantine, dataset.split, rank))


def once(
    dataset: SampleDataset[S],
    *,
    rank: int = 0,
    world: int = 1,
    num_workers: int = 0,
    quarantine: str | Path | None = None,
) -> Iterator[S]:
    """Each usable sample once, in order; rank r takes every world-th."""
    batches = [[Draw(number, None)] for number in range(rank, len(dataset), world)]
    for (sample,) in SampleLoader(dataset, batches, num_workers, Quarantine(quarantine, dataset.split, rank)):
        yield sample


def seeded(seed: int, position: int) -> int:
    """A seed for the draws of the sample at a position of a training, whoever reads it."""
    return int(np.random.SeedSequence((seed, position)).generate_state(1)[0])


def to_tensor(pixels: np.ndarray) -> Tensor:
    """(3, H, W) uint8 of an image (H, W, 3)."""
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _handed_over(delivery: Delivery) -> Delivery:
    try:
        move_to_shared_memory(delivery.samples)
    except DataError as error:
        return delivery._replace(samples=[], error=error)
    return delivery
