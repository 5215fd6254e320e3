"""The embedded data set: procedural scenes with labels, boxes, instance masks and semantic classes.

Textured backgrounds, several overlapping objects of ten shapes with cast shadows, and clutter in front and behind. A
class is a shape: colours, textures, light, size and turn are drawn for each object, so none of them gives it away. An
object is a silhouette, inflated to a relief and lit from the scene's light. Sample i of a split is a pure function of
(seed, split, i): the same on every machine, however many processes draw.
"""

from __future__ import annotations

import io
import math
import os
import zlib
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from pycocotools import mask as rle

from data_pipeline.errors import DataError
from data_pipeline.shards import Manifest, ShardWriter, Split, new_dataset
from data_pipeline.sources import Sample

CLASSES = ("ball", "cushion", "pyramid", "ring", "star", "cross", "crescent", "heart", "arrow", "capsule")
SUPERSAMPLING = 2
JPEG_QUALITY = 90
MIN_VISIBLE = 0.3  # share of an object that must be seen for it to count


@dataclass(frozen=True)
class Relief:
    """An object before it is lit: silhouette (S, S) in 0..1 and surface normals (S, S, 3)."""

    alpha: np.ndarray
    normals: np.ndarray


def write_scenes(
    out: Path | str,
    *,
    train: int = 2000,
    val: int = 400,
    size: int = 96,
    seed: int = 0,
    progress: Callable[[], None] | None = None,
) -> Manifest:
    """Write `train` + `val` scenes of size x size pixels as a data set in the new folder `out`.

    Args:
        progress: called after each scene.

    Raises:
        DataError: `out` is there already; impossible numbers.
    """
    if min(train, val) < 1 or not 32 <= size <= 2048:
        raise DataError(f"train={train}, val={val}, size={size}: counts must be at least 1, the size 32..2048 pixels")
    with new_dataset(Path(out)) as folder, ProcessPoolExecutor(os.cpu_count(), initializer=_one_thread) as pool:
        splits = {}
        for split, count in (("train", train), ("val", val)):
            with ShardWriter(folder, split) as writer:
                jobs = ((seed, split, index, size) for index in range(count))
                for index, sample in enumerate(pool.map(_scene_of, jobs, chunksize=16)):
                    writer.write(sample.fields(f"{split}-{index:07d}"))
                    if progress is not None:
                        progress()
            splits[split] = Split(tuple(writer.shards))
        manifest = Manifest("scenes", CLASSES, splits)
        manifest.save(folder)
    return manifest


def _one_thread() -> None:
    cv2.setNumThreads(0)


def _scene_of(job: tuple[int, str, int, int]) -> Sample:
    return draw_scene(*job)


def draw_scene(seed: int, split: str, index: int, size: int) -> Sample:
    """Scene `index` of a split: JPEG bytes, label, boxes, masks and semantic classes."""
    random = np.random.default_rng(np.random.SeedSequence((seed, zlib.crc32(split.encode()), index)))
    side = size * SUPERSAMPLING
    light = _unit(np.array([*random.uniform(-0.8, 0.8, 2), random.uniform(0.6, 1.2)]))
    picture = _background(random, side)
    _clutter(random, picture, light, count=int(random.integers(2, 6)))

    count = int(random.integers(2, 6))
    kinds = random.integers(0, len(CLASSES), count)
    main = int(random.integers(0, count))
    covered = np.zeros((count, side, side), np.float32)
    full = np.zeros(count)
    for number, kind in enumerate(kinds):
        share = random.uniform(0.42, 0.62) if number == main else random.uniform(0.18, 0.32)
        spread = 0.12 if number == main else 0.38
        centre = 0.5 + random.uniform(-spread, spread, 2)
        relief = _relief(random, CLASSES[kind], side, share * side / 2, centre * side)
        _paint(random, picture, relief, light)
        covered[:number] *= 1 - relief.alpha
        covered[number] = relief.alpha
        full[number] = relief.alpha.sum()
    front = _clutter(random, picture, light, count=int(random.integers(0, 3)))
    covered *= 1 - front

    picture += random.normal(0, random.uniform(0, 0.02), picture.shape).astype(np.float32)
    small = cv2.resize(np.clip(picture, 0, 1), (size, size), interpolation=cv2.INTER_AREA)
    masks = np.stack([cv2.resize(mask, (size, size), interpolation=cv2.INTER_AREA) for mask in covered]) > 0.5
    return _annotate((small * 255).round().astype(np.uint8), masks, kinds, full / SUPERSAMPLING**2)


def _annotate(pixels: np.ndarray, masks: np.ndarray, kinds: np.ndarray, full: np.ndarray) -> Sample:
    """The sample of a picture, from what is visible of each object."""
    visible = masks.sum(axis=(1, 2))
    seen = [i for i in range(len(kinds)) if visible[i] > 0 and visible[i] >= MIN_VISIBLE * full[i]]
    semantic = np.zeros(pixels.shape[:2], np.uint8)
    for i in range(len(kinds)):
        semantic[masks[i]] = kinds[i] + 1
    boxes = []
    for i in seen:
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
        label=int(kinds[int(visible.argmax())]),
        boxes=boxes,
        labels=[int(kinds[i]) for i in seen],
        masks=[{"size": list(code["size"]), "counts": code["counts"].decode()} for code in encoded],
        semantic=mask.getvalue(),
    )


def _relief(random: np.random.Generator, name: str, side: int, radius: float, centre: np.ndarray) -> Relief:
    """Silhouette of a shape, turned and stretched, and the normals of its inflated surface."""
    angle = random.uniform(0, 2 * math.pi)
    stretch = random.uniform(0.8, 1.0)
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    matrix = turn @ np.diag([1.0, stretch]) * radius
    mask = np.zeros((side, side), np.uint8)
    for polygon, value in _outlines(name):
        points = polygon @ matrix.T + centre
        cv2.fillPoly(mask, [np.round(points * 16).astype(np.int32)], value, lineType=cv2.LINE_AA, shift=4)
    distance = cv2.distanceTransform((mask > 127).astype(np.uint8), cv2.DIST_L2, 5)
    edge = random.uniform(0.25, 0.6) * radius
    rise = np.clip(distance / edge, 0, 1)
    height = cv2.GaussianBlur(np.sqrt(1 - (1 - rise) ** 2) * edge, (0, 0), max(radius / 12, 1))
    slope_x, slope_y = cv2.Sobel(height, cv2.CV_32F, 1, 0) / 8, cv2.Sobel(height, cv2.CV_32F, 0, 1) / 8
    normals = np.stack([-slope_x, -slope_y, np.ones_like(height)], axis=-1)
    normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
    return Relief(mask.astype(np.float32) / 255, normals)


def _outlines(name: str) -> list[tuple[np.ndarray, int]]:
    """Polygons of a shape in the unit disc, in order of painting: 255 adds, 0 takes away."""
    turn = np.linspace(0, 2 * math.pi, 72, endpoint=False)
    disc = np.stack([np.cos(turn), np.sin(turn)], axis=1)

    def polygon(*points: tuple[float, float]) -> list[tuple[np.ndarray, int]]:
        return [(np.array(points), 255)]

    if name == "ball":
        return [(disc, 255)]
    if name == "cushion":
        power = np.sign(disc) * np.abs(disc) ** 0.4
        return [(power * 0.85, 255)]
    if name == "pyramid":
        return polygon((0, -1), (0.95, 0.75), (-0.95, 0.75))
    if name == "ring":
        return [(disc, 255), (disc * 0.5, 0)]
    if name == "star":
        spokes = np.where(np.arange(10) % 2 == 0, 1.0, 0.42)
        corner = np.arange(10) * math.pi / 5
        return [(np.stack([np.sin(corner) * spokes, -np.cos(corner) * spokes], axis=1), 255)]
    if name == "cross":
        arm = 0.32
        return [
            (np.array([(-arm, -1), (arm, -1), (arm, 1), (-arm, 1)]), 255),
            (np.array([(-1, -arm), (1, -arm), (1, arm), (-1, arm)]), 255),
        ]
    if name == "crescent":
        return [(disc, 255), (disc * 0.82 + np.array([0.48, 0.0]), 0)]
    if name == "heart":
        x = 16 * np.sin(turn) ** 3
        y = 13 * np.cos(turn) - 5 * np.cos(2 * turn) - 2 * np.cos(3 * turn) - np.cos(4 * turn)
        return [(np.stack([x, -y], axis=1) / 17, 255)]
    if name == "arrow":
        return polygon((-1, -0.25), (0.1, -0.25), (0.1, -0.75), (1, 0), (0.1, 0.75), (0.1, 0.25), (-1, 0.25))
    left, right = disc * 0.38 - np.array([0.6, 0]), disc * 0.38 + np.array([0.6, 0])
    return [(left, 255), (right, 255), (np.array([(-0.6, -0.38), (0.6, -0.38), (0.6, 0.38), (-0.6, 0.38)]), 255)]


def _paint(random: np.random.Generator, picture: np.ndarray, relief: Relief, light: np.ndarray) -> None:
    """Cast the shadow of an object onto `picture`, then the object, textured and lit."""
    side = len(picture)
    reach = random.uniform(0.03, 0.08) * side
    shift = np.array([[1, 0, -light[0] * reach], [0, 1, -light[1] * reach]], np.float32)
    shadow = cv2.warpAffine(relief.alpha, shift, (side, side))
    shadow = cv2.GaussianBlur(shadow, (0, 0), side / 60)
    picture *= (1 - 0.5 * shadow)[..., None]

    colour = _texture(random, side)
    diffuse = np.clip(relief.normals @ light, 0, 1)
    half = _unit(light + np.array([0, 0, 1.0]))
    shine = random.uniform(0, 0.5) * np.clip(relief.normals @ half, 0, 1) ** 30
    lit = colour * (0.25 + 0.85 * diffuse)[..., None] + shine[..., None]
    alpha = relief.alpha[..., None]
    picture *= 1 - alpha
    picture += alpha * lit.astype(np.float32)


def _texture(random: np.random.Generator, side: int) -> np.ndarray:
    """(S, S, 3): two colours mixed by a pattern: plain, stripes, checks, dots or noise."""
    first, second = random.uniform(0.05, 1.0, 3), random.uniform(0.05, 1.0, 3)
    kind = random.integers(0, 5)
    angle, period = random.uniform(0, math.pi), random.uniform(0.04, 0.15) * side
    y, x = np.mgrid[:side, :side].astype(np.float32)
    u = (x * math.cos(angle) + y * math.sin(angle)) * (2 * math.pi / period)
    v = (-x * math.sin(angle) + y * math.cos(angle)) * (2 * math.pi / period)
    if kind == 0:
        pattern = np.zeros_like(x)
    elif kind == 1:
        pattern = 0.5 + 0.5 * np.tanh(3 * np.sin(u))
    elif kind == 2:
        pattern = 0.5 + 0.5 * np.tanh(3 * np.sin(u) * np.sin(v))
    elif kind == 3:
        pattern = (np.sin(u) + np.sin(v) > 1.1).astype(np.float32)
    else:
        pattern = _noise(random, side, int(random.integers(4, 24)))
    return (first + (second - first) * pattern[..., None]).astype(np.float32)


def _noise(random: np.random.Generator, side: int, cells: int) -> np.ndarray:
    """Smooth noise (S, S) in 0..1 of two octaves, `cells` cells a side."""
    total = np.zeros((side, side), np.float32)
    for octave, weight in ((cells, 0.65), (cells * 3, 0.35)):
        grid = random.random((octave, octave), np.float32)
        total += weight * cv2.resize(grid, (side, side), interpolation=cv2.INTER_CUBIC)
    return np.clip(total, 0, 1)


def _background(random: np.random.Generator, side: int) -> np.ndarray:
    """(S, S, 3): a wall and often a floor, textured, under a gradient of light."""
    picture = _texture(random, side) * random.uniform(0.4, 0.9)
    if random.random() < 0.6:
        horizon = int(random.uniform(0.45, 0.75) * side)
        picture[horizon:] = (_texture(random, side) * random.uniform(0.4, 0.9))[horizon:]
    grain = 0.75 + 0.5 * _noise(random, side, int(random.integers(2, 6)))
    return (picture * grain[..., None]).astype(np.float32)


def _clutter(random: np.random.Generator, picture: np.ndarray, light: np.ndarray, count: int) -> np.ndarray:
    """Draw `count` sticks and pebbles of no class; returns what they cover, (S, S) in 0..1."""
    side = len(picture)
    covered = np.zeros((side, side), np.float32)
    for _ in range(count):
        mask = np.zeros((side, side), np.uint8)
        start = random.uniform(0, side, 2)
        step = random.normal(0, 0.2 * side, 2) if random.random() < 0.6 else np.zeros(2)
        thickness = max(2, int(random.uniform(0.01, 0.035) * side))
        ends = [tuple(int(value) for value in point) for point in (start, start + step)]
        cv2.line(mask, ends[0], ends[1], 255, thickness, lineType=cv2.LINE_AA)
        alpha = mask.astype(np.float32)[..., None] / 255
        picture *= 1 - alpha
        picture += alpha * random.uniform(0.05, 0.95, 3).astype(np.float32) * (0.4 + 0.6 * light[2])
        covered = np.maximum(covered, alpha[..., 0])
    return covered


def _unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)
