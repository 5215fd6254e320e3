"""From shards to batches of canvases: read, decode, collate, in torch's DataLoader.

A canvas is an image squashed to a square of `canvas_size` pixels, uint8; its true aspect travels along, and crops
are drawn in the true image's proportions. All that follows decoding is batched on the device (`views`). Worker
processes only decode: the order comes from the sampler, so their number changes nothing.

Decoding gives what Pillow's `convert("RGB")` after `exif_transpose` would: upright by the EXIF orientation,
greyscale repeated over three channels, CMYK converted, 16 bits reduced to 8, transparency dropped. What cannot be
decoded is refused with the sample's key, never replaced.
"""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import PIL.Image
import simplejpeg
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data_pipeline.errors import DataError
from data_pipeline.order import ElasticSampler, SampleOrder
from data_pipeline.shards import IMAGE_EXTENSIONS, Manifest, ShardReader

ORIENTATION_TAG = 0x0112
JPEG_START = b"\xff\xd8\xff"
# What an EXIF block opens with, by whether the file is a JPEG; the others are PNG and WebP.
EXIF_MARKS = {True: (b"Exif\x00\x00",), False: (b"eXIf", b"EXIF")}

# OpenCV prints a warning on damaged files, for which we raise an error with the sample's name.
cv2.setLogLevel(2)


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


def decode_image(data: bytes, size: int | None = None) -> np.ndarray:
    """(H, W, 3) uint8 RGB of JPEG, PNG or WebP bytes, upright.

    With `size`, a JPEG may come at a half, a quarter or an eighth of its resolution, as long as both sides stay at
    or above `size`: libjpeg-turbo then skips most of the inverse transform.

    Raises:
        DataError: the bytes are not an image.
    """
    return _decode(data, size)[0]


def decode_canvas(data: bytes, size: int) -> tuple[Tensor, float]:
    """The canvas (3, size, size) uint8 of an image and the true image's aspect, width / height.

    Resized as Pillow's bilinear filter does it, antialiased; an image that is size x size already comes unchanged.

    Raises:
        DataError: the bytes are not an image.
    """
    array, aspect = _decode(data, size)
    pixels = torch.from_numpy(array).permute(2, 0, 1)
    if pixels.shape[1:] != (size, size):
        # torch's uint8 kernel: a third of the time of OpenCV's INTER_AREA.
        pixels = F.interpolate(pixels[None], size=(size, size), mode="bilinear", antialias=True)[0]
    return pixels.contiguous(), aspect


def _decode(data: bytes, size: int | None) -> tuple[np.ndarray, float]:
    """Upright pixels, a JPEG's possibly reduced to no less than `size`, and the full image's width / height."""
    # Not simplejpeg.is_jpeg: cameras append to their files, which then do not end as it asks.
    is_jpeg = data.startswith(JPEG_START)
    try:
        if is_jpeg:
            height, width = simplejpeg.decode_jpeg_header(data)[:2]
            # Powers of two only: what lies between is slower than full resolution, or rounds the image's edge. The
            # accurate transform costs the same here and equals libjpeg's bit for bit.
            factor = next((factor for factor in (8, 4, 2) if size and min(height, width) >= factor * size), 1)
            pixels = simplejpeg.decode_jpeg(
                data,
                "RGB",
                fastdct=False,
                fastupsample=False,
                min_height=-(-height // factor),
                min_width=-(-width // factor),
                min_factor=factor,
            )
        else:
            flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
            pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags) if data else None
            height, width = (0, 0) if pixels is None else pixels.shape[:2]
    except ValueError as error:
        raise DataError(f"not an image that can be decoded ({error})") from error
    except cv2.error as error:
        raise DataError(f"not an image that can be decoded ({error.err})") from error
    if pixels is None:
        raise DataError(f"not an image that can be decoded ({len(data)} bytes); use JPEG, PNG or WebP")
    orientation = _orientation(data) if any(mark in data for mark in EXIF_MARKS[is_jpeg]) else 1
    aspect = height / width if orientation >= 5 else width / height
    return _upright(pixels, orientation), aspect


def _orientation(data: bytes) -> int:
    """EXIF orientation 1..8; 1 where the EXIF block is damaged, which leaves the picture readable."""
    try:
        with warnings.catch_warnings(action="ignore"):
            orientation = PIL.Image.open(io.BytesIO(data)).getexif().get(ORIENTATION_TAG, 1)
    except Exception:  # Pillow's parsers raise many classes on damaged metadata
        return 1
    return orientation if orientation in range(1, 9) else 1


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Undo an EXIF orientation: 2..4 mirror or turn by 180 degrees, 5..8 also swap the axes."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


class CanvasDataset(Dataset[Canvas]):
    """Map-style data set over the shards of one split; items are `Canvas`."""

    def __init__(self, root: str | Path, split: str, canvas_size: int):
        if canvas_size < 1:
            raise DataError(f"canvas_size={canvas_size} is impossible; it must be at least 1")
        self.reader = ShardReader(root, Manifest.load(root).split(split))
        self.canvas_size = canvas_size

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> Canvas:
        sample = self.reader.read(index)
        try:
            image = next((sample[extension] for extension in IMAGE_EXTENSIONS if extension in sample), None)
            if image is None:
                raise DataError("has no image; build the data set again")
            pixels, aspect = decode_canvas(image, self.canvas_size)
        except DataError as error:
            raise DataError(f"{self.reader.root}: sample {sample['__key__']}: {error}") from error
        label = json.loads(sample.get("json", b"{}")).get("label")
        return Canvas(pixels, aspect, -1 if label is None else int(label), index)

    def __getitems__(self, indexes: list[int]) -> list[Canvas] | DataError:
        """A batch for DataLoader; an error travels as a value to `CanvasLoader`, which raises it."""
        try:
            return [self[index] for index in indexes]
        except DataError as error:
            return error


class CanvasLoader(DataLoader[CanvasBatch]):
    """A DataLoader that raises a worker's DataError as it was.

    DataLoader itself would put the worker's traceback into the message, which is to be one line.
    """

    def __iter__(self) -> Iterator[CanvasBatch]:  # type: ignore[override]
        for batch in super().__iter__():
            if isinstance(batch, DataError):
                break
            yield batch
        else:
            return
        # Let go of the workers first: the error's traceback would keep them until it is collected.
        self._iterator = None
        raise batch


def collate(samples: list[Canvas] | DataError) -> CanvasBatch | DataError:
    """Stack canvases to (N, 3, S, S)."""
    if isinstance(samples, DataError):
        return samples
    return CanvasBatch(
        torch.stack([sample.pixels for sample in samples]),
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
) -> CanvasLoader:
    """This rank's batches without end, from position `samples_seen` of the order; `batch_size` is global.

    Raises:
        DataError: the batch is larger than the data set, or too small for `world` ranks.
    """
    dataset = CanvasDataset(root, split, canvas_size)
    if batch_size > len(dataset):
        raise DataError(
            f"{root}: batch_size={batch_size} is larger than the {len(dataset)} samples of split {split!r}; "
            f"use at most {len(dataset)}"
        )
    order = SampleOrder(dataset.reader.split.shard_sizes, seed, shuffle_shards, num_lanes)
    return _loader(dataset, ElasticSampler(order, batch_size, rank, world, samples_seen), num_workers)


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
) -> CanvasLoader:
    """Each sample of the split once, in order, or `limit` of them spread evenly; rank r takes every world-th.

    `batch_size` is this rank's; the last batch may be smaller.
    """
    dataset = CanvasDataset(root, split, canvas_size)
    if batch_size < 1:
        raise DataError(f"batch_size={batch_size} is impossible; it must be at least 1")
    count = len(dataset) if limit is None else min(limit, len(dataset))
    # Spread, because image folders come class by class.
    indexes = (np.arange(count) * len(dataset) // max(count, 1))[rank::world].tolist()
    batches = [indexes[first : first + batch_size] for first in range(0, len(indexes), batch_size)]
    return _loader(dataset, batches, num_workers)


def _loader(dataset: CanvasDataset, batches: Iterable[list[int]], num_workers: int) -> CanvasLoader:
    if num_workers < 0:
        raise DataError(f"num_workers={num_workers} is impossible; 0 decodes in the process itself")
    return CanvasLoader(
        dataset,  # type: ignore[arg-type]  # `collate` makes the batches of its samples
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_one_thread,
    )


def _one_thread(_: int) -> None:
    # A worker is one thread by design; OpenCV's pool also does not survive the fork that made the worker.
    cv2.setNumThreads(0)
