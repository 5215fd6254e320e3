"""Images with their semantic masks: whole, or as augmented crops.

A mask holds a class for each pixel of the upright image, 255 where it is to be ignored (docs/data.md). Augmentation is
torchvision's, which moves image and mask together and resamples the mask by nearest neighbour.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from data_pipeline.cache import ShardCache
from data_pipeline.decoding import decode_indexes
from data_pipeline.errors import SampleError
from data_pipeline.samples import (
    MIN_SIDE,
    SampleDataset,
    picture_of,
    seeded,
    to_tensor,
)
from data_pipeline.shards import facts_of
from data_pipeline.surveys import Survey, UnusableError, survey

IGNORE = 255


class MaskSample(NamedTuple):
    """An image, or a crop of one, with its mask."""

    image: Tensor  # (3, H, W) uint8 RGB
    mask: Tensor  # (H, W) uint8
    index: int  # type: ignore[assignment]  # of the data set; hides tuple.index
    key: str


def survey_masks(root: str | Path, split: str, num_classes: int, cache: ShardCache | None = None) -> Survey:
    """Look at every sample's mask; `found` counts the samples that serve.

    Raises:
        DataError: no such split, a damaged shard, or a sample that cannot be read.
    """
    return survey(root, split, partial(_inspect, num_classes=num_classes), cache)


def _inspect(sample: dict[str, Any], num_classes: int) -> tuple[int, Counter[str]]:
    mask, facts = read_mask(sample, num_classes), facts_of(sample)
    noted = facts.get("height", mask.shape[0]), facts.get("width", mask.shape[1])
    if noted != mask.shape:
        raise UnusableError("mask of another size than its image")
    return 1, Counter()


def read_mask(sample: dict[str, Any], num_classes: int) -> np.ndarray:
    """The mask (H, W) uint8 of a raw sample (UnusableError: it has none that says anything)."""
    if "mask.png" not in sample:
        raise UnusableError("image without a semantic mask")
    try:
        mask = decode_indexes(sample["mask.png"])
    except SampleError as error:
        raise UnusableError("mask that is no 8-bit grey PNG") from error
    if min(mask.shape) < MIN_SIDE:
        raise UnusableError(f"image smaller than {MIN_SIDE} pixels")
    counted = mask[mask != IGNORE]
    if not counted.size:
        raise UnusableError(f"mask that is {IGNORE}, ignored, everywhere")
    if int(counted.max()) >= num_classes:
        raise UnusableError("mask with a class that the data set does not name")
    return mask


class TrainingCrops:
    """Random scale, crop and mirroring of image and mask together; what lies outside of the image is ignored.

    Draws from torch's global generator.

    Args:
        size: height and width of the crop, pixels.
        scales: least and largest, relative to the size at which an image just fits the crop.
    """

    def __init__(self, size: tuple[int, int], scales: tuple[float, float] = (0.5, 2.0)):
        self.augment = v2.Compose(
            [
                v2.ScaleJitter(size, scales, antialias=True),
                v2.RandomCrop(size, pad_if_needed=True, fill={tv_tensors.Image: 0, tv_tensors.Mask: IGNORE}),
                v2.RandomHorizontalFlip(),
            ]
        )

    def __call__(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Crop (3, *size) uint8 and its mask (*size) uint8."""
        crop, its_mask = self.augment(tv_tensors.Image(image), tv_tensors.Mask(mask))
        return crop.as_subclass(Tensor).contiguous(), its_mask.as_subclass(Tensor).contiguous()


class MaskDataset(SampleDataset[MaskSample]):
    """Images with masks; in training, crops of them, drawn by `seed` and the sample's position in the order.

    Args:
        short_side: pixels; images are resized so that their shorter side has so many, aspect kept. None: as they are.
        crops: what training makes of a sample; None leaves it whole.
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        usable: np.ndarray,
        num_classes: int,
        short_side: int | None = None,
        crops: TrainingCrops | None = None,
        seed: int = 0,
        cache: ShardCache | None = None,
    ):
        super().__init__(root, split, usable, cache)
        self.num_classes, self.crops, self.seed = num_classes, crops, seed
        self.resize = None if short_side is None else v2.Resize(short_side, antialias=True)

    def load(self, sample: dict[str, Any], index: int, position: int | None) -> MaskSample:
        """An image with its mask (SampleError: it does not decode, or is of another size than the mask)."""
        pixels, mask = picture_of(sample), read_mask(sample, self.num_classes)
        if pixels.shape[:2] != mask.shape:
            raise SampleError(f"is {pixels.shape[1]} x {pixels.shape[0]}, its mask {mask.shape[1]} x {mask.shape[0]}")
        image, its_mask = to_tensor(pixels), torch.from_numpy(mask)
        if self.resize is not None:
            resized = self.resize(tv_tensors.Image(image), tv_tensors.Mask(its_mask))
            image, its_mask = (part.as_subclass(Tensor) for part in resized)
        if position is not None and self.crops is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seeded(self.seed, position))
                image, its_mask = self.crops(image, its_mask)
        return MaskSample(image, its_mask, index, sample["__key__"])
