"""From shards to batches of canvases: read, decode, collate, in torch's DataLoader.

A canvas is an image squashed to a square of `canvas_size` pixels, uint8; its true aspect travels along, and crops
are drawn in the true image's proportions. All that follows decoding is batched on the device (`views`). Worker
processes only decode: the order comes from the sampler, so their number changes nothing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import simplejpeg
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data_pipeline.errors import DataError
from data_pipeline.order import ElasticSampler, SampleOrder
from data_pipeline.shards import IMAGE_EXTENSIONS, Manifest, ShardReader


class CanvasBatch(NamedTuple):
    """A batch of N decoded images."""

    canvas: Tensor  # (N, 3, S, S) uint8 RGB
    aspect: Tensor  # (N,) float32, width / height of the source image
    label: Tensor  # (N,) int64, -1 where there is none
    index: Tensor  # (N,) int64 dataset index


class Canvas(NamedTuple):
    """One decoded image: (S, S, 3) uint8 RGB, aspect, label, dataset index."""

    pixels: np.ndarray
    aspect: float
    label: int
    index: int


def decode_image(data: bytes, size: int | None = None) -> np.ndarray:
    """(H, W, 3) uint8 RGB of JPEG, PNG or WebP bytes, upright.

    With `size`, a JPEG may come at an eighth to seven eighths of its resolution, as long as both sides stay at or
    above `size`: libjpeg-turbo then skips most of the inverse transform.

    Raises:
        DataError: the bytes are not an image.
    """
    try:
        if simplejpeg.is_jpeg(data) and not _has_exif(data):
            minimum = {} if size is None else {"min_height": size, "min_width": size, "min_factor": 1}
            return simplejpeg.decode_jpeg(data, "RGB", fastdct=True, fastupsample=False, **minimum)
        # OpenCV turns the image upright by its EXIF tag, and reads what libjpeg-turbo's RGB output cannot give.
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    except (ValueError, cv2.error) as error:
        raise DataError(f"not an image that can be decoded ({error})") from error
    if pixels is None:
        raise DataError("not an image that can be decoded")
    return pixels


def _has_exif(data: bytes) -> bool:
    return b"Exif\x00" in data[:4096]


def decode_canvas(data: bytes, size: int) -> tuple[np.ndarray, float]:
    """The canvas (size, size, 3) of an image and the image's aspect, width / height.

    An image that is size x size already comes unchanged; a larger one is averaged over areas, a smaller one
    interpolated.
    """
    pixels = decode_image(data, size)
    height, width = pixels.shape[:2]
    if (height, width) != (size, size):
        shrinks = height >= size and width >= size
        pixels = cv2.resize(pixels, (size, size), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    return pixels, width / height


class CanvasDataset(Dataset[Canvas]):
    """Map-style data set over the shards of one split; items are `Canvas`."""

    def __init__(self, root: str | Path, split: str, canvas_size: int):
        self.reader = ShardReader(root, Manifest.load(root).split(split))
        self.canvas_size = canvas_size

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> Canvas:
        sample = self.reader.read(index)
        image = next((sample[extension] for extension in IMAGE_EXTENSIONS if extension in sample), None)
        if image is None:
            raise DataError(f"{self.reader.root}: sample {sample['__key__']} has no image; build the data set again")
        try:
            pixels, aspect = decode_canvas(image, self.canvas_size)
        except DataError as error:
            raise DataError(f"{self.reader.root}: sample {sample['__key__']}: {error}") from error
        label = json.loads(sample.get("json", b"{}")).get("label")
        return Canvas(pixels, aspect, -1 if label is None else int(label), index)


def collate(samples: list[Canvas]) -> CanvasBatch:
    """Stack canvases to (N, 3, S, S)."""
    pixels = np.stack([sample.pixels for sample in samples])
    return CanvasBatch(
        torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))),
        torch.tensor([sample.aspect for sample in samples], dtype=torch.float32),
        torch.tensor([sample.label for sample in samples], dtype=torch.int64),
        torch.tensor([sample.index for sample in samples], dtype=torch.int64),
    )


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
) -> DataLoader[CanvasBatch]:
    """This rank's batches without end, from position `samples_seen` of the order; `batch_size` is global.

    Raises:
        DataError: the batch is larger than the data set, or too small for `world` ranks.
    """
    dataset = CanvasDataset(root, split, canvas_size)
    if batch_size > len(dataset):
        raise DataError(f"{root}: batch_size={batch_size} is larger than the {len(dataset)} samples of {split}")
    if batch_size < world:
        raise DataError(f"batch_size={batch_size} is too small for {world} workers; use at least {world}")
    order = SampleOrder(dataset.reader.split.shard_sizes, seed, shuffle_shards, num_lanes)
    sampler = ElasticSampler(order, batch_size, rank, world, samples_seen)
    return _loader(dataset, sampler, num_workers)


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
) -> DataLoader[CanvasBatch]:
    """Each sample of the split once, in order, or `limit` of them spread evenly; rank r takes every world-th.

    `batch_size` is this rank's.
    """
    dataset = CanvasDataset(root, split, canvas_size)
    count = len(dataset) if limit is None else min(limit, len(dataset))
    # Spread, because image folders come class by class.
    indexes = (np.arange(count) * len(dataset) // max(count, 1))[rank::world].tolist()
    batches = [indexes[first : first + batch_size] for first in range(0, len(indexes), batch_size)]
    return _loader(dataset, batches, num_workers)


def _loader(dataset: CanvasDataset, batches: object, num_workers: int) -> DataLoader[CanvasBatch]:
    return DataLoader(
        dataset,
        batch_sampler=batches,  # type: ignore[arg-type]
        collate_fn=collate,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_one_thread,
    )


def _one_thread(_: int) -> None:
    cv2.setNumThreads(0)
