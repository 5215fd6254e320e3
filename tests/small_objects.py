"""Small data sets with boxes and masks: coloured rectangles on grey, images of unequal sizes; and eight scenes."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_pipeline.manifest import Manifest, Split
from data_pipeline.shards import ShardWriter
from data_pipeline.sources.annotations import encode_mask

NAMES = ("red", "green", "blue")
SIZES = ((64, 64), (80, 48), (48, 96))  # width, height
# Widths of a detector that learns a few images in seconds.
NARROW_DETECTOR = ["anchors=[8,16,32,64,128]", "fpn_channels=32", "hidden=128", "proposals=100", "rois=64"]
# A semantic segmentation of 64 px scenes in seconds.
SMALL_CROPS = ["height=64", "width=64", "short_side=64", "teacher_epochs=1"]


def rectangle(number: int, width: int, height: int) -> tuple[np.ndarray, dict[str, Any]]:
    """An image of one rectangle whose colour is its class, and its annotations."""
    random = np.random.default_rng(number)
    pixels = random.integers(90, 130, (height, width, 3), dtype=np.uint8)
    side_x, side_y = random.integers(16, 32, 2)
    x, y = int(random.integers(0, width - side_x)), int(random.integers(0, height - side_y))
    box, label = [x, y, x + int(side_x), y + int(side_y)], number % len(NAMES)
    pixels[box[1] : box[3], box[0] : box[2]] = 20
    pixels[box[1] : box[3], box[0] : box[2], label] = 240
    mask = np.zeros((height, width), np.uint8)
    mask[box[1] : box[3], box[0] : box[2]] = 1
    return pixels, {
        "width": width, "height": height, "boxes": [box], "labels": [label], "masks": [encode_mask(mask)],
        "iscrowd": [0], "difficult": [False],
    }  # fmt: skip


def rectangles(count: int, first: int = 0) -> list[tuple[np.ndarray, dict[str, Any]]]:
    return [rectangle(first + number, *SIZES[number % len(SIZES)]) for number in range(count)]


def write_objects(
    root: Path,
    splits: dict[str, Sequence[tuple[np.ndarray, dict[str, Any]]]],
    classes: Sequence[str] = NAMES,
    max_samples: int = 1000,
) -> Path:
    """A data set of images (H, W, 3) and what is to stand in their JSON, whether it makes sense or not."""
    root.mkdir(parents=True)
    written = {}
    for split, samples in splits.items():
        with ShardWriter(root, split, max_samples=max_samples) as writer:
            for number, (pixels, facts) in enumerate(samples):
                file = io.BytesIO()
                Image.fromarray(pixels).save(file, "PNG")
                writer.write({"__key__": f"{split}-{number:04d}", "png": file.getvalue(), "json": facts})
        written[split] = Split(tuple(writer.shards))
    Manifest("rectangles", tuple(classes), written).save(root)
    return root


def write_eight_scenes(root: Path, size: int = 64) -> Path:
    """Eight scenes that are training and validation split at once: what can be learned by heart is measured."""
    from data_pipeline.scenes import write_scenes

    manifest = write_scenes(root, train=8, val=1, size=size, num_processes=1)
    train = manifest.split("train")
    Manifest(
        manifest.name, manifest.classes, {"train": train, "val": train}, semantic_classes=manifest.semantic_classes
    ).save(root)
    return root
