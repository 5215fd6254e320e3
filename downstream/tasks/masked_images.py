"""Images with their semantic masks, from shards: whole, or as augmented crops.

A mask holds a class for each pixel of the upright image, 255 where it is to be ignored (docs/data.md). Augmentation is
torchvision's, which moves image and mask together and resamples the mask by nearest neighbour.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from data_pipeline.decoding import decode_image
from data_pipeline.shards import IMAGE_EXTENSIONS, Manifest, ShardReader
from downstream.errors import TaskError

IGNORE = 255


class MaskedImages(Dataset[tuple[Tensor, Tensor]]):
    """Items: image (3, H, W) uint8 RGB and mask (H, W) uint8, each of its own size.

    Args:
        short_side: pixels; images are resized so that their shorter side has so many, aspect kept. None: as they are.

    Raises:
        TaskError: the data set has no semantic masks.
    """

    def __init__(self, root: str | Path, split: str, short_side: int | None = None):
        manifest = Manifest.load(root)
        self.classes, self.root = manifest.mask_names, root
        self.reader = ShardReader(root, manifest.split(split))
        if "mask.png" not in self.reader.read(0):
            raise TaskError(f"{root} has no semantic masks; semantic_segmentation needs them (voc, cityscapes, scenes)")
        self.resize = None if short_side is None else v2.Resize(short_side, antialias=True)

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        sample = self.reader.read(index)
        name = f"{self.root}: sample {sample['__key__']}"
        data = next((sample[extension] for extension in IMAGE_EXTENSIONS if extension in sample), None)
        if data is None or "mask.png" not in sample:
            raise TaskError(f"{name} has no {'image' if data is None else 'mask'}; build the data set again without it")
        pixels = decode_image(data)
        mask = cv2.imdecode(np.frombuffer(sample["mask.png"], np.uint8), cv2.IMREAD_UNCHANGED)
        if mask is None or mask.dtype != np.uint8 or mask.shape != pixels.shape[:2]:
            raise TaskError(f"{name}: its mask is no 8-bit grey PNG of the image's size; `dicm data verify` finds all")
        beyond = mask[mask != IGNORE]
        if beyond.size and int(beyond.max()) >= len(self.classes):
            raise TaskError(f"{name}: its mask holds {beyond.max()}, the data set has {len(self.classes)} classes")
        pair = tv_tensors.Image(torch.from_numpy(pixels).permute(2, 0, 1)), tv_tensors.Mask(torch.from_numpy(mask))
        if self.resize is not None:
            pair = self.resize(*pair)
        return pair[0].as_subclass(Tensor), pair[1].as_subclass(Tensor)


class TrainingCrops:
    """Random scale, crop and mirroring of image and mask together; what lies outside of the image is ignored.

    Draws from torch's global generator, so a seeded step repeats.

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

    def batch(self, dataset: MaskedImages, indexes: list[int]) -> tuple[Tensor, Tensor]:
        """Images (N, 3, *size) uint8 and masks (N, *size) int64 of samples of `dataset`."""
        crops = [self(*dataset[index]) for index in indexes]
        images, masks = zip(*crops, strict=True)
        return torch.stack(images), torch.stack(masks).long()


def epochs_of_batches(count: int, batch_size: int, seed: int) -> Iterator[list[int]]:
    """Indexes of batches without end: each of `count` samples once an epoch, in another order; the last are left out.

    Raises:
        TaskError: a batch larger than the data set.
    """
    if not 1 <= batch_size <= count:
        raise TaskError(f"batch_size={batch_size} must lie in 1..{count}, the samples that there are")
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(count, generator=generator).tolist()
        for first in range(0, count - batch_size + 1, batch_size):
            yield order[first : first + batch_size]
