"""Drawing for the procedural scenes: silhouettes raised to reliefs, textures, light, shadows, clutter.

Pictures are (H, W, 3) float32, linear in 0..1 or a little above, RGB; lengths are pixels of the supersampled
picture. An object is a polygon in the unit disc, painted as a mask, raised by its distance to the edge to a relief,
covered with a texture that follows the relief, and lit by the scene's light. Each object is drawn in a window of its
own, so its cost is its area.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np

CLASSES = ("ball", "cushion", "pyramid", "ring", "star", "cross", "crescent", "heart", "arrow", "capsule")
MAX_TURN = 0.8  # radians, of an object
HABIT = 0.85  # share of the objects that wear the hue of their class
MUTED = 0.45  # most vivid background
HUE_SPREAD = 0.035  # around that hue; hues of classes lie 0.1 apart
SHIFT = 4  # fractional bits of cv2's polygon corners


@dataclass(frozen=True)
class Light:
    """Direction to the light (unit vector, z towards the viewer), its colour, the ambient share of it."""

    direction: tuple[float, float, float]
    colour: np.ndarray
    ambient: float
    softness: float  # of shadows, relative to their length


@dataclass(frozen=True)
class Relief:
    """An object before it is lit, in a window whose top left corner lies at `corner` (x, y) of the picture."""

    corner: tuple[int, int]
    alpha: np.ndarray  # (S, S) in 0..1
    slope_x: np.ndarray  # (S, S), of the height
    slope_y: np.ndarray
    radius: float

    def window(self, side: int) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
        """Where a picture of side x side and this window overlap: slices of the picture, slices of the window."""
        outer, inner = [], []
        for start, length in zip(reversed(self.corner), self.alpha.shape, strict=True):
            first, last = max(start, 0), max(min(start + length, side), 0)
            outer.append(slice(first, max(first, last)))
            inner.append(slice(first - start, max(first, last) - start))
        return (outer[0], outer[1]), (inner[0], inner[1])


def draw_light(random: np.random.Generator) -> Light:
    """A light from any side, low or high, white to warm or cool."""
    angle, height = random.uniform(0, 2 * math.pi), random.uniform(0.5, 1.3)
    length = math.hypot(1, height)
    warmth = random.uniform(-0.12, 0.12)
    colour = np.array([1 + warmth, 1.0, 1 - warmth], np.float32) * np.float32(random.uniform(0.65, 1.15))
    direction = (math.cos(angle) / length, math.sin(angle) / length, height / length)
    return Light(direction, colour, random.uniform(0.2, 0.45), random.uniform(0.15, 0.6))


def draw_relief(random: np.random.Generator, name: str, radius: float, centre: tuple[float, float]) -> Relief:
    """A shape of class `name`, turned, squeezed and raised: rounded, domed or with flat facets."""
    angle, squeeze = random.uniform(-MAX_TURN, MAX_TURN), random.uniform(0.75, 1.0)
    cos, sin = math.cos(angle) * radius, math.sin(angle) * radius
    turn = np.array([[cos, -sin * squeeze], [sin, cos * squeeze]])
    half = int(radius * 1.7) + 3  # room for the shadow
    corner = (int(centre[0]) - half, int(centre[1]) - half)
    mask = np.zeros((2 * half, 2 * half), np.uint8)
    offset = np.array(centre) - corner
    for polygon, value in outline(name):
        corners = np.round((polygon @ turn.T + offset) * 2**SHIFT).astype(np.int32)
        cv2.fillPoly(mask, [corners], value, lineType=cv2.LINE_AA, shift=SHIFT)
    distance = cv2.distanceTransform((mask > 127).astype(np.uint8), cv2.DIST_L2, 5)
    edge = min(random.uniform(0.2, 1.0) * radius, float(distance.max()) + 1)
    rise = np.minimum(distance / np.float32(edge), 1)
    if random.random() < 0.7:
        rise = np.sqrt(np.maximum(1 - (1 - rise) ** 2, 0))
    height = cv2.GaussianBlur(rise * np.float32(edge * random.uniform(0.6, 1.1)), (0, 0), max(radius / 14, 0.8))
    slope_x = cv2.Sobel(height, cv2.CV_32F, 1, 0, scale=1 / 8)
    slope_y = cv2.Sobel(height, cv2.CV_32F, 0, 1, scale=1 / 8)
    return Relief(corner, mask.astype(np.float32) / 255, slope_x, slope_y, radius)


def outline(name: str) -> list[tuple[np.ndarray, int]]:
    """Polygons of a shape in the unit disc, in order of painting: 255 adds, 0 takes away."""
    turn = np.linspace(0, 2 * math.pi, 72, endpoint=False)
    disc = np.stack([np.cos(turn), np.sin(turn)], axis=1)
    if name == "ball":
        return [(disc * 0.9, 255)]
    if name == "cushion":
        return [(np.sign(disc) * np.abs(disc) ** 0.4 * 0.8, 255)]
    if name == "pyramid":
        return [(np.array([(0, -1), (0.9, 0.7), (-0.9, 0.7)]), 255)]
    if name == "ring":
        return [(disc, 255), (disc * 0.52, 0)]
    if name == "star":
        spokes = np.where(np.arange(10) % 2 == 0, 1.05, 0.45)
        corner = np.arange(10) * math.pi / 5
        return [(np.stack([np.sin(corner) * spokes, -np.cos(corner) * spokes], axis=1), 255)]
    if name == "cross":
        arm = np.array([(-0.3, -1), (0.3, -1), (0.3, 1), (-0.3, 1)])
        return [(arm, 255), (arm[:, ::-1], 255)]
    if name == "crescent":
        return [(disc, 255), (disc * 0.8 + np.array([0.46, 0.0]), 0)]
    if name == "heart":
        x = 16 * np.sin(turn) ** 3
        y = 13 * np.cos(turn) - 5 * np.cos(2 * turn) - 2 * np.cos(3 * turn) - np.cos(4 * turn)
        return [(np.stack([x, -y], axis=1) / 17, 255)]
    if name == "arrow":
        half = [(-1, -0.27), (0.1, -0.27), (0.1, -0.8), (1.05, 0)]
        return [(np.array(half + [(x, -y) for x, y in reversed(half[:3])]), 255)]
    assert name == "capsule", name
    ends = [(disc * 0.38 + np.array([x, 0]), 255) for x in (-0.62, 0.62)]
    return [*ends, (np.array([(-0.62, -0.38), (0.62, -0.38), (0.62, 0.38), (-0.62, 0.38)]), 255)]


def draw_hue(random: np.random.Generator, kind: int) -> float | None:
    """The hue of an object of class `kind`: that of its class, as with fruits, or now and then any."""
    if random.random() >= HABIT:
        return None
    return (kind / len(CLASSES) + random.uniform(-HUE_SPREAD, HUE_SPREAD)) % 1


def paint(
    random: np.random.Generator, picture: np.ndarray, relief: Relief, light: Light, hue: float | None = None
) -> None:
    """Cast the shadow of an object onto `picture`, then paint the object, textured and lit, in colours of `hue`."""
    outer, inner = relief.window(len(picture))
    target = picture[outer]
    if not target.size:
        return
    light_x, light_y, light_z = light.direction
    _cast(target, relief.alpha, inner, light, reach=relief.radius * random.uniform(0.2, 0.4))

    size = len(relief.alpha)
    x, y = _grid(size, size)
    scale = relief.radius * 0.25
    material = draw_texture(
        random,
        x - relief.slope_x * scale,
        y - relief.slope_y * scale,
        random.uniform(0.18, 0.6) * relief.radius,
        lambda: draw_colour(random) if hue is None else draw_colour(random, hue, 0.55, 0.95, 0.4),
    )
    facing = 1 / np.sqrt(1 + relief.slope_x**2 + relief.slope_y**2)
    diffuse = np.maximum(facing * (light_z - light_x * relief.slope_x - light_y * relief.slope_y), 0)
    half_z = light_z + 1
    half_length = math.sqrt(light_x**2 + light_y**2 + half_z**2)
    mirror = facing * (half_z - light_x * relief.slope_x - light_y * relief.slope_y) / np.float32(half_length)
    gloss, sharpness = random.uniform(0, 0.7), random.uniform(8, 60)
    shine = np.float32(gloss) * np.maximum(mirror, 0) ** np.float32(sharpness)
    bright = np.float32(light.ambient) * (0.5 + 0.5 * facing) + np.float32(1.1 - light.ambient) * diffuse
    lit = (material * bright[..., None] + shine[..., None]) * light.colour
    alpha = relief.alpha[inner][..., None]
    target += alpha * (lit[inner] - target)


def _cast(target: np.ndarray, alpha: np.ndarray, inner: tuple[slice, slice], light: Light, reach: float) -> None:
    """Darken `target` by the shadow of `alpha`, and by the gap right below it."""
    shift_x, shift_y = -light.direction[0] * reach, -light.direction[1] * reach
    shift = np.array([[1, 0, shift_x], [0, 1, shift_y]], np.float32)
    size = alpha.shape[::-1]
    shadow = cv2.warpAffine(alpha, shift, size)
    shadow = cv2.GaussianBlur(shadow, (0, 0), max(reach * light.softness, 0.8))
    strength = np.float32(0.9 - light.ambient)
    target *= (1 - strength * shadow[inner])[..., None]


def draw_texture(
    random: np.random.Generator, x: np.ndarray, y: np.ndarray, period: float, colour: Callable[[], np.ndarray]
) -> np.ndarray:
    """(H, W, 3): two draws of `colour` mixed by a pattern of about `period` pixels at coordinates x, y (H, W)."""
    first, second = colour(), colour()
    second = first + (second - first) * np.float32(random.uniform(0.25, 1.0))
    angle, phase = random.uniform(0, 2 * math.pi), random.uniform(0, 100)
    cos, sin = np.float32(math.cos(angle) / period), np.float32(math.sin(angle) / period)
    u, v = x * cos + y * sin + np.float32(phase), y * cos - x * sin + np.float32(phase)
    kind = random.integers(-3, 8)
    if kind <= 0:  # plain, a little uneven
        pattern = 0.35 * noise(random, x.shape, period)
    elif kind == 1:  # stripes
        pattern = _step(np.sin(2 * math.pi * u) + np.float32(random.uniform(-0.6, 0.6)))
    elif kind == 2:  # checks
        pattern = _step(np.sin(math.pi * u) * np.sin(math.pi * v) * 2)
    elif kind == 3:  # dots
        pattern = _step((np.sin(2 * math.pi * u) + np.sin(2 * math.pi * v) - 0.9) * 2)
    elif kind == 4:  # zigzag
        pattern = _step(np.sin(2 * math.pi * (u + np.abs(v % 1 - 0.5))) * 2)
    elif kind == 5:  # wood
        rings = np.sin(2 * math.pi * (u + 1.5 * noise(random, x.shape, period * 3)))
        pattern = 0.5 + 0.35 * rings + 0.3 * noise(random, x.shape, max(period / 6, 2))
    elif kind == 6:  # marble
        pattern = np.abs(2 * noise(random, x.shape, period * 1.5) - 1) ** np.float32(0.6)
    else:  # clouds
        pattern = noise(random, x.shape, period)
    return first + (second - first) * pattern[..., None]


def draw_colour(
    random: np.random.Generator,
    hue: float | None = None,
    least_vivid: float = 0.0,
    most_vivid: float = 0.9,
    least_bright: float = 0.2,
) -> np.ndarray:
    """(3,) RGB of `hue`, or of any; grey to vivid and dark to bright within the bounds."""
    hue = random.random() if hue is None else hue
    saturation = least_vivid + (most_vivid - least_vivid) * random.random() ** 0.7
    return np.array(colorsys.hsv_to_rgb(hue, saturation, random.uniform(least_bright, 1.0)), np.float32)


def noise(random: np.random.Generator, shape: tuple[int, ...], period: float) -> np.ndarray:
    """Smooth noise (H, W) in 0..1 of two octaves, features of about `period` pixels."""
    height, width = shape
    total = np.zeros((height, width), np.float32)
    for cell, weight in ((period, 0.65), (period / 2.5, 0.35)):
        grid = random.random((int(height / cell) + 3, int(width / cell) + 3), np.float32)
        total += np.float32(weight) * cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC)
    return np.clip(total, 0, 1)


def draw_background(random: np.random.Generator, side: int, light: Light) -> np.ndarray:
    """(S, S, 3): one or two materials in a pool of light."""
    x, y = _grid(side, side)

    def colour() -> np.ndarray:
        return draw_colour(random, most_vivid=MUTED)

    picture = draw_texture(random, x, y, random.uniform(0.05, 0.25) * side, colour)
    if random.random() < 0.55:
        angle = random.uniform(0, math.pi)
        across = (x - side / 2) * np.float32(math.cos(angle)) + (y - side / 2) * np.float32(math.sin(angle))
        across -= np.float32(random.uniform(-0.25, 0.25) * side)
        other = draw_texture(random, x, y, random.uniform(0.05, 0.25) * side, colour)
        picture += np.clip(across + 0.5, 0, 1)[..., None] * (other - picture)
        # The nearer material lies a little above the other and shades its edge.
        edge = np.clip(1 - across / np.float32(0.05 * side), 0, 1) * (across > 0)
        picture *= (1 - np.float32(0.35) * edge)[..., None]
    centre_x = side * (0.5 + 0.5 * light.direction[0])
    centre_y = side * (0.5 + 0.5 * light.direction[1])
    far = ((x - np.float32(centre_x)) ** 2 + (y - np.float32(centre_y)) ** 2) / np.float32(side**2)
    level = np.float32(random.uniform(0.65, 1.0)) * (1 - np.float32(random.uniform(0.1, 0.45)) * far)
    level *= 0.85 + 0.3 * noise(random, (side, side), side / 3)
    return picture * level[..., None] * light.colour


def draw_clutter(random: np.random.Generator, picture: np.ndarray, light: Light, count: int) -> np.ndarray:
    """Draw `count` twigs, wires and pebbles of no class; returns what they cover, (S, S) in 0..1."""
    side = len(picture)
    covered = np.zeros((side, side), np.float32)
    for _ in range(count):
        mask = np.zeros((side, side), np.uint8)
        start = random.uniform(0, side, 2)
        if random.random() < 0.65:
            bend, reach = random.normal(0, 0.12 * side, 2), random.normal(0, 0.25 * side, 2)
            t = np.linspace(0, 1, 12)[:, None]
            points = start + reach * t + bend * t * (1 - t) * 4
            corners = np.round(points * 2**SHIFT).astype(np.int32)
            thickness = max(1, round(random.uniform(0.008, 0.024) * side))
            cv2.polylines(mask, [corners], False, 255, thickness, lineType=cv2.LINE_AA, shift=SHIFT)
        else:
            turn = np.linspace(0, 2 * math.pi, 9, endpoint=False)
            spokes = random.uniform(0.012, 0.035) * side * random.uniform(0.7, 1.1, 9)
            points = start + np.stack([np.cos(turn) * spokes, np.sin(turn) * spokes], axis=1)
            corners = np.round(points * 2**SHIFT).astype(np.int32)
            cv2.fillPoly(mask, [corners], 255, lineType=cv2.LINE_AA, shift=SHIFT)
        x, y, width, height = cv2.boundingRect(mask)
        if not width:
            continue
        pad = round(0.03 * side) + 2
        window = (slice(max(y - pad, 0), y + height + pad), slice(max(x - pad, 0), x + width + pad))
        alpha = mask[window].astype(np.float32) / 255
        target, whole = picture[window], (slice(None), slice(None))
        _cast(target, alpha, whole, light, reach=random.uniform(0.015, 0.03) * side)
        # A ridge: lit on the side of the light, dark on the other.
        soft = cv2.GaussianBlur(alpha, (0, 0), max(0.008 * side, 0.8))
        tilt = cv2.Sobel(soft, cv2.CV_32F, 1, 0) * np.float32(light.direction[0])
        tilt += cv2.Sobel(soft, cv2.CV_32F, 0, 1) * np.float32(light.direction[1])
        lit = np.clip(0.7 - 0.35 * tilt, 0.15, 1.3)[..., None] * draw_colour(random) * light.colour
        target += alpha[..., None] * (lit - target)
        covered[window] = np.maximum(covered[window], alpha)
    return covered


def _step(values: np.ndarray) -> np.ndarray:
    """0 below, 1 above zero, with a soft edge."""
    return np.clip(values * np.float32(2.5) + np.float32(0.5), 0, 1)


def _grid(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    return x, y
