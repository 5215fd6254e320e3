"""The embedded data set: procedural scenes with labels, boxes, instance masks and semantic classes.

Textured backgrounds, several overlapping objects of ten shapes with cast shadows, and clutter behind and in front. A
class is a shape that mostly wears its own hue, as fruits do, so that little data teaches something of it; texture,
relief, light, size and turn are drawn for each object and do not give it away. The image's label is the class of its
dominant object, the largest, near the middle and never mostly hidden.
Scene i of a split is a pure function of (seed, split, i), however many processes draw.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from pycocotools import mask as rle

from data_pipeline.errors import DataError
from data_pipeline.manifest import Manifest, Split
from data_pipeline.parallel import ordered_map
from data_pipeline.rendering import (
    CLASSES,
    Relief,
    draw_background,
    draw_clutter,
    draw_hue,
    draw_light,
    draw_relief,
    paint,
)
from data_pipeline.shards import ShardWriter, new_dataset
from data_pipeline.sources import Sample

SUPERSAMPLING = 2
GAMMA = 1.6
JPEG_QUALITY = 90
DOMINANT_SHARE = (0.46, 0.7)  # of the scene's side, the dominant object's extent
DOMINANT_VISIBLE = 0.6  # least share of it that other objects leave to be seen
MIN_VISIBLE, MIN_PIXELS = 0.2, 12  # an object counts when this share of it, and so many pixels, are seen
IGNORE = 255  # semantic class of objects of which too little is seen


def write_scenes(
    out: Path | str,
    *,
    train: int = 2000,
    val: int = 400,
    size: int = 96,
    seed: int = 0,
    num_processes: int | None = None,
    progress: Callable[[], None] | None = None,
) -> Manifest:
    """Write `train` + `val` scenes of size x size pixels as a data set in the new folder `out`.

    Args:
        num_processes: for drawing; None is one a core, as far as memory has room. The bytes do not depend on it.
        progress: called after each scene.

    Raises:
        DataError: `out` is there already; impossible numbers.
    """
    if min(train, val) < 1 or not 32 <= size <= 2048 or seed < 0:
        raise DataError(
            f"train={train}, val={val}, size={size}, seed={seed}: "
            "counts must be at least 1, the size 32..2048 pixels, the seed at least 0"
        )
    with new_dataset(Path(out)) as folder:
        splits = {}
        for split, count in (("train", train), ("val", val)):
            jobs = ((seed, split, index, size) for index in range(count))
            with ShardWriter(folder, split) as writer:
                for index, sample in enumerate(ordered_map(_draw, jobs, num_processes, preload=[__name__])):
                    writer.write(sample.fields(f"{split}-{index:07d}"))
                    if progress is not None:
                        progress()
            splits[split] = Split(tuple(writer.shards))
        manifest = Manifest("scenes", CLASSES, splits, semantic_classes=("background", *CLASSES))
        manifest.save(folder)
    return manifest


def _draw(job: tuple[int, str, int, int]) -> Sample:
    return draw_scene(*job)


def draw_scene(seed: int, split: str, index: int, size: int) -> Sample:
    """Scene `index` of a split: JPEG bytes, label, boxes, masks and semantic classes."""
    random = np.random.default_rng(np.random.SeedSequence((seed, zlib.crc32(split.encode()), index)))
    side = size * SUPERSAMPLING
    light = draw_light(random)
    picture = draw_background(random, side, light)
    draw_clutter(random, picture, light, count=int(random.integers(1, 5)))

    kinds, reliefs, dominant = _arrange(random, side)
    for kind, relief in zip(kinds, reliefs, strict=True):
        paint(random, picture, relief, light, draw_hue(random, kind))
    covered = _visible(reliefs, side)
    covered *= 1 - draw_clutter(random, picture, light, count=int(random.integers(0, 3)))

    small = np.clip(cv2.resize(picture, (size, size), interpolation=cv2.INTER_AREA), 0, 1) ** np.float32(1 / GAMMA)
    small += random.standard_normal(small.shape, np.float32) * np.float32(random.uniform(0, 0.025))
    pixels = (np.clip(small, 0, 1) * 255).round().astype(np.uint8)
    masks = np.stack([cv2.resize(mask, (size, size), interpolation=cv2.INTER_AREA) for mask in covered]) > 0.5
    areas = np.array([float(relief.alpha.sum()) for relief in reliefs]) / SUPERSAMPLING**2
    return _annotate(pixels, masks, kinds, areas, dominant)


def _arrange(random: np.random.Generator, side: int) -> tuple[list[int], list[Relief], int]:
    """Classes and reliefs of a scene's objects, from back to front, and which of them is the dominant one."""
    kind = int(random.integers(len(CLASSES)))
    extent = random.uniform(*DOMINANT_SHARE) * side
    centre = side * (0.5 + random.uniform(-0.13, 0.13, 2))
    main = draw_relief(random, CLASSES[kind], extent / 2, (centre[0], centre[1]))
    # The others are sized by the area of the dominant one, so that it is the largest whatever its shape.
    reach = float(np.sqrt(main.alpha.sum()))
    objects = []
    for _ in range(int(random.integers(1, 6))):
        other, radius = int(random.integers(len(CLASSES))), reach * random.uniform(0.22, 0.42)
        place = side * random.uniform(0.06, 0.94, 2)
        relief = draw_relief(random, CLASSES[other], max(radius, 0.05 * side), (place[0], place[1]))
        objects.append((other, relief))
    depth = int(random.integers(0, len(objects) + 1))
    # Brought forward past one object after another until enough of it is seen.
    while True:
        order = [*objects[:depth], (kind, main), *objects[depth:]]
        reliefs = [relief for _, relief in order]
        if depth == len(objects) or _visible(reliefs, side)[depth].sum() >= DOMINANT_VISIBLE * main.alpha.sum():
            return [kind for kind, _ in order], reliefs, depth
        depth += 1


def _visible(reliefs: list[Relief], side: int) -> np.ndarray:
    """(K, S, S) in 0..1: what is seen of each object, painted from back to front."""
    covered = np.zeros((len(reliefs), side, side), np.float32)
    for number, relief in enumerate(reliefs):
        outer, inner = relief.window(side)
        covered[(slice(number), *outer)] *= 1 - relief.alpha[inner]
        covered[(number, *outer)] = relief.alpha[inner]
    return covered


def _annotate(pixels: np.ndarray, masks: np.ndarray, kinds: list[int], areas: np.ndarray, dominant: int) -> Sample:
    """The sample of a picture, from what is visible of each object: masks (K, H, W) bool, whole areas (K,)."""
    visible = masks.sum(axis=(1, 2))
    seen = np.flatnonzero((visible >= MIN_PIXELS) & (visible >= MIN_VISIBLE * areas))
    semantic = np.zeros(pixels.shape[:2], np.uint8)
    for i, kind in enumerate(kinds):
        semantic[masks[i]] = kind + 1 if i in seen else IGNORE
    boxes = []
    for i in map(int, seen):
        x, y, width, height = cv2.boundingRect(masks[i].astype(np.uint8))
        boxes.append([x, y, x + width, y + height])
    encoded = [rle.encode(np.asfortranarray(masks[i].astype(np.uint8))) for i in seen]
    image, mask = io.BytesIO(), io.BytesIO()
    Image.fromarray(pixels).save(image, "JPEG", quality=JPEG_QUALITY)
    Image.fromarray(semantic).save(mask, "PNG")
    return Sample(
        image=image.getvalue(),
        extension="jpg",
        width=pixels.shape[1],
        height=pixels.shape[0],
        label=kinds[dominant],
        boxes=boxes,
        labels=[kinds[i] for i in seen],
        masks=[{"size": list(code["size"]), "counts": code["counts"].decode()} for code in encoded],
        semantic=mask.getvalue(),
    )
