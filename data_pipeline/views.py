"""From canvases to augmented views, batched, on the device of the batch.

A crop is (x0, y0, x1, y1) in 0..1 of the canvas; the canvas is the image squashed to a square, so one resampling
crops, restores the true proportions and scales. Brightness, contrast, saturation, hue and greyscale of an image
are one affine map of its colours, a 3x4 matrix; the Gaussian blur is separable with one kernel an image. Every
draw comes from the generator that is passed in, which lives on the device of the batch: views are a pure
function of (batch, options, generator state), and no image's view depends on the others' pixels.

Sources: RandomResizedCrop (Szegedy et al. 2015), the augmentations of MoCo v2 (Chen et al. 2020),
centre-suppressed sampling of crops by a Beta distribution (Peng et al. 2022, ContrastiveCrop).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.errors import DataError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
LUMA = (0.2989, 0.587, 0.114)  # torchvision's rgb_to_grayscale
CROP_ATTEMPTS = 10  # as RandomResizedCrop
# A crop that shrinks by more than this reads the canvas at half its resolution. At 1.65 the root mean square
# distance to an antialiased triangle filter (torchvision's) is the same from both, on photographs 6 of 255.
HALVE_ABOVE = 1.65
# Images that a CPU works on at once: more leave its caches between steps, and take up to three times as long.
CPU_CHUNK = 16


@dataclass
class ViewConfig:
    """Options of the augmentations; probabilities are for each image."""

    scale_min: float = 0.2  # area of a crop over the area of the image
    scale_max: float = 1.0
    ratio_min: float = 3 / 4  # width / height of a crop in the true image
    ratio_max: float = 4 / 3
    beta: float = 0.6  # guided crops: centre ~ Beta(beta, beta) inside the box
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1  # of a full turn
    jitter_probability: float = 0.8
    grey_probability: float = 0.2
    blur_probability: float = 0.5
    blur_sigma_min: float = 0.1  # pixels at 224, scaled with the size of the view
    blur_sigma_max: float = 2.0
    flip_probability: float = 0.5

    def validate(self) -> None:
        """Refuse what cannot work (DataError with the option, its value and the range)."""
        for name in ("jitter", "grey", "blur", "flip"):
            value = getattr(self, f"{name}_probability")
            if not 0 <= value <= 1:
                raise DataError(f"{name}_probability={value:g} is impossible; it must lie in 0..1")
        for name in ("scale", "ratio", "blur_sigma"):
            low, high = getattr(self, f"{name}_min"), getattr(self, f"{name}_max")
            if not 0 < low <= high:
                raise DataError(f"{name}_min={low:g} and {name}_max={high:g} must be positive and in that order")
        if self.scale_max > 1:
            raise DataError(f"scale_max={self.scale_max:g} is impossible; a crop is at most the whole image, 1")
        for name, most in (("brightness", 1.0), ("contrast", 1.0), ("saturation", 1.0), ("hue", 0.5)):
            if not 0 <= getattr(self, name) <= most:
                raise DataError(f"{name}={getattr(self, name):g} is impossible; it must lie in 0..{most:g}")
        if self.beta <= 0:
            raise DataError(f"beta={self.beta:g} is impossible; it must be positive")


def whole_boxes(num_boxes: int, device: torch.device | None = None) -> Tensor:
    """(N, 4) boxes of the whole canvas."""
    return torch.tensor([0.0, 0.0, 1.0, 1.0], device=device).repeat(num_boxes, 1)


def random_crops(aspect: Tensor, config: ViewConfig, generator: torch.Generator) -> Tensor:
    """(N, 4) crops of images with the given aspects (N,): RandomResizedCrop's distribution.

    Area and aspect ratio are drawn until the crop fits into the image, ten times at most, and the crop lies
    anywhere in the image; where none fits, the largest central crop within the ratios is taken.
    """
    size, fits = _crop_sizes(aspect, config, generator)
    place = _uniform((len(aspect), 2), generator, aspect.device)
    return _crops_at(torch.where(fits, place, 0.5) * (1 - size), size)


def guided_crops(boxes: Tensor, aspect: Tensor, config: ViewConfig, generator: torch.Generator) -> Tensor:
    """(N, 4) crops whose centres are drawn from Beta(beta, beta) along both sides of boxes (N, 4).

    Sizes are those of `random_crops`. A crop that would leave the image is moved back into it, by as little as
    that takes, so its centre may then lie outside a box at the image's edge.
    """
    size, _ = _crop_sizes(aspect, config, generator)
    place = _symmetric_beta((len(aspect), 2), config.beta, generator, aspect.device)
    centre = boxes[:, :2] + place * (boxes[:, 2:] - boxes[:, :2])
    return _crops_at(torch.minimum((centre - size / 2).clamp(min=0), 1 - size), size)


def _crop_sizes(aspect: Tensor, config: ViewConfig, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(N, 2) widths and heights of crops in 0..1 of the canvas, and (N, 1) whether one of the draws fitted."""
    shape, device = (len(aspect), CROP_ATTEMPTS), aspect.device
    area = config.scale_min + (config.scale_max - config.scale_min) * _uniform(shape, generator, device)
    log_min, log_max = math.log(config.ratio_min), math.log(config.ratio_max)
    ratio = torch.exp(log_min + (log_max - log_min) * _uniform(shape, generator, device))
    # In a canvas of unit sides: width * height = area and width * aspect / height = ratio.
    width = torch.sqrt(area * ratio / aspect[:, None])
    height = torch.sqrt(area * aspect[:, None] / ratio)
    fits = (width <= 1) & (height <= 1)
    first = fits.float().argmax(dim=1, keepdim=True)
    drawn = torch.cat([width.gather(1, first), height.gather(1, first)], dim=1)
    nearest = aspect.clamp(config.ratio_min, config.ratio_max)
    largest = torch.stack([nearest / aspect, aspect / nearest], dim=1).clamp(max=1)
    any_fits = fits.any(dim=1, keepdim=True)
    return torch.where(any_fits, drawn, largest), any_fits


def _crops_at(corner: Tensor, size: Tensor) -> Tensor:
    # Rounding may carry the far corner a bit beyond the canvas.
    return torch.cat([corner, (corner + size).clamp(max=1)], dim=1)


def resample(canvas: Tensor, crops: Tensor, size: int, flip: Tensor | None = None) -> Tensor:
    """Crops (N, 4) of canvases (N, 3, S, S), uint8 or float in 0..1, as (N, 3, size, size) float32 in 0..1.

    One bilinear resampling. Against aliasing, a crop that shrinks by more than `HALVE_ABOVE` (mean of both sides)
    reads its canvas halved by area averages, as often as that holds. `flip` (N,) bool mirrors left and right.
    """
    images = _in_unit_range(canvas)
    if flip is not None:
        crops = torch.where(flip[:, None], crops[:, [2, 1, 0, 3]], crops)
    scale = images.shape[-1] / size
    most_halvings = _halvings(scale)
    if most_halvings == 0:
        return _sample(images, crops, size)
    sides = (crops[:, 2:] - crops[:, :2]).abs()
    halvings = torch.log2(sides.prod(dim=1).sqrt() * (scale / HALVE_ABOVE)).ceil().clamp(0, most_halvings)
    out = images.new_empty(len(crops), 3, size, size)
    for level in range(most_halvings + 1):
        chosen = (halvings == level).nonzero()[:, 0]
        if len(chosen):
            side = max(1, round(images.shape[-1] / 2**level))
            # Area averages also where the side is odd, so that 0..1 means the same at every level.
            halved = F.interpolate(images[chosen], size=(side, side), mode="area") if level else images[chosen]
            out[chosen] = _sample(halved, crops[chosen], size)
    return out


def _halvings(shrink: float) -> int:
    return max(0, math.ceil(math.log2(shrink / HALVE_ABOVE)))


def _sample(images: Tensor, crops: Tensor, size: int) -> Tensor:
    """Bilinear samples at the centres of size x size equal parts of each crop."""
    centres = (torch.arange(size, device=images.device, dtype=images.dtype) + 0.5) / size
    # Without align_corners, -1 and 1 are the outer edges of the canvas. Not affine_grid: its matrix product would
    # run in TF32 where that is on, and misplace samples by a tenth of a pixel.
    x = 2 * (crops[:, 0:1] + (crops[:, 2:3] - crops[:, 0:1]) * centres) - 1
    y = 2 * (crops[:, 1:2] + (crops[:, 3:4] - crops[:, 1:2]) * centres) - 1
    shape = (len(crops), size, size)
    grid = torch.stack([x[:, None, :].expand(shape), y[:, :, None].expand(shape)], dim=3)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _in_unit_range(images: Tensor) -> Tensor:
    return images.float().div_(255) if images.dtype == torch.uint8 else images


class ColourJitter(NamedTuple):
    """Parameters (N,) of the colour changes; 1, 1, 1, 0 and False leave an image as it is."""

    brightness: Tensor  # factor
    contrast: Tensor  # factor about the mean grey
    saturation: Tensor  # factor about each pixel's grey
    hue: Tensor  # share of a full turn
    grey: Tensor  # bool: no colour at all


def draw_colour_jitter(
    count: int, config: ViewConfig, generator: torch.Generator, device: torch.device
) -> ColourJitter:
    """Parameters for `count` images: all four changes or none (`jitter_probability`), and greyscale apart."""
    strengths = torch.tensor([config.brightness, config.contrast, config.saturation, config.hue], device=device)
    jittered = _bernoulli(count, config.jitter_probability, generator, device)
    drawn = (2 * _uniform((4, count), generator, device) - 1) * strengths[:, None] * jittered
    grey = _bernoulli(count, config.grey_probability, generator, device)
    return ColourJitter(1 + drawn[0], 1 + drawn[1], 1 + drawn[2], drawn[3], grey)


def colour_matrices(means: Tensor, jitter: ColourJitter) -> Tensor:
    """(N, 3, 4) maps of colour: brightness, then contrast about the mean grey, saturation, hue, greyscale.

    `means` (N, 3) are the images' mean colours. Hue is a rotation about the grey axis, a linear approximation
    of a turn of HSV's hue: on photographs at a tenth of a turn, which changes them by 14 of 255 (root mean square),
    the two lie 7 apart. Unlike in torchvision, the order of the steps is fixed and values between them are not
    clipped.
    """
    luma = torch.tensor(LUMA, device=means.device)
    eye, grey = torch.eye(3, device=means.device), luma.expand(3, 3)
    saturation = jitter.saturation[:, None, None]
    colour = _hue_rotation(jitter.hue * (2 * math.pi)) @ (saturation * eye + (1 - saturation) * grey)
    colour = torch.where(jitter.grey[:, None, None], grey @ colour, colour)
    mean_grey = jitter.brightness * (means @ luma)
    offset = ((1 - jitter.contrast) * mean_grey)[:, None] * colour.sum(dim=2)
    linear = colour * (jitter.contrast * jitter.brightness)[:, None, None]
    return torch.cat([linear, offset[:, :, None]], dim=2)


def apply_colour(images: Tensor, matrices: Tensor) -> Tensor:
    """Map the colours of (N, 3, H, W) by (N, 3, 4), clipped to 0..1."""
    count, _, height, width = images.shape
    flat = torch.baddbmm(matrices[:, :, 3:], matrices[:, :, :3], images.reshape(count, 3, -1))
    return flat.clamp_(0, 1).view(count, 3, height, width)


def gaussian_blur(images: Tensor, sigmas: Tensor, radius: int) -> Tensor:
    """Blur (N, 3, H, W) by a separable Gaussian of `sigmas` (N,) pixels, cut off at `radius` pixels.

    A sigma of zero leaves an image as it is; edges are reflected.
    """
    count, _, height, width = images.shape
    radius = min(radius, height - 1, width - 1)
    taps = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
    kernels = torch.exp(-0.5 * (taps / sigmas.clamp_min(1e-3)[:, None]) ** 2)
    kernels = (kernels / kernels.sum(dim=1, keepdim=True)).repeat_interleave(3, dim=0)[:, None]
    planes = F.pad(images, (radius, radius, radius, radius), mode="reflect").flatten(0, 1)[None]
    planes = F.conv2d(planes, kernels[:, :, :, None], groups=3 * count)
    planes = F.conv2d(planes, kernels[:, :, None], groups=3 * count)
    return planes.view(count, 3, height, width)


class Photometric(NamedTuple):
    """Parameters of `photometric` for N images: their colour changes, and sigmas (N,) of their blur in pixels."""

    jitter: ColourJitter
    sigmas: Tensor  # 0: no blur
    radius: int  # pixels; of all, because an image's blur must not depend on its neighbours' sigmas

    def part(self, chosen: slice) -> Photometric:
        """Those of some of the images."""
        jitter = ColourJitter(*(values[chosen] for values in self.jitter))
        return Photometric(jitter, self.sigmas[chosen], self.radius)


def draw_photometric(
    count: int, size: int, config: ViewConfig, generator: torch.Generator, device: torch.device
) -> Photometric:
    """Parameters for `count` views of `size` pixels; the blur's sigma is in pixels of a 224 view and shrinks along."""
    jitter = draw_colour_jitter(count, config, generator, device)
    blurred = _bernoulli(count, config.blur_probability, generator, device)
    low, high = config.blur_sigma_min * size / 224, config.blur_sigma_max * size / 224
    sigmas = low + (high - low) * _uniform((count,), generator, device)
    return Photometric(jitter, sigmas * blurred, math.ceil(3 * high))


def photometric(images: Tensor, parameters: Photometric) -> Tensor:
    """Colour map and blur of (N, 3, H, W) in 0..1. Flipping is left to `resample`, where it is free."""
    # bfloat16 would leave eight bits of a colour; a caller's autocast ends here.
    with torch.autocast(images.device.type, enabled=False):
        images = apply_colour(images, colour_matrices(images.mean(dim=(2, 3)), parameters.jitter))
        blurred = parameters.sigmas.nonzero()[:, 0]
        if len(blurred):
            images[blurred] = gaussian_blur(images[blurred], parameters.sigmas[blurred], parameters.radius)
    return images


def normalize(images: Tensor) -> Tensor:
    """(N, 3, H, W) in 0..1 to zero mean and unit variance by ImageNet's statistics."""
    mean = torch.tensor(IMAGENET_MEAN, device=images.device).view(3, 1, 1)
    std = torch.tensor(IMAGENET_STD, device=images.device).view(3, 1, 1)
    return (images - mean).div_(std)


def two_views(
    canvas: Tensor,
    aspect: Tensor,
    size: int,
    config: ViewConfig,
    generator: torch.Generator,
    boxes: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Two augmented, normalised views (N, 3, size, size) of canvases (N, 3, S, S), and their crops (N, 2, 4).

    With `boxes` (N, 4) the crops are guided, without they are RandomResizedCrop's.
    """
    count, device = len(canvas), canvas.device
    crops, drawn = [], []
    flips = _bernoulli(2 * count, config.flip_probability, generator, device).split(count)
    for _ in flips:
        if boxes is None:
            crops.append(random_crops(aspect, config, generator))
        else:
            crops.append(guided_crops(boxes, aspect, config, generator))
        drawn.append(draw_photometric(count, size, config, generator, device))
    views = tuple(torch.empty(count, 3, size, size, device=device) for _ in flips)
    chunk = CPU_CHUNK if device.type == "cpu" else max(count, 1)
    for first in range(0, count, chunk):
        part = slice(first, first + chunk)
        images = _in_unit_range(canvas[part])
        for view, crop, flip, parameters in zip(views, crops, flips, drawn, strict=True):
            view[part] = normalize(photometric(resample(images, crop[part], size, flip[part]), parameters.part(part)))
    return views[0], views[1], torch.stack(crops, dim=1)


def center_images(canvas: Tensor, aspect: Tensor, size: int, crop: float = 1.0) -> Tensor:
    """(N, 3, size, size) uint8 for evaluation: the central square of each true image, `crop` of its short side.

    A square image whose canvas has `size` pixels comes unchanged, also among others.
    """
    if crop == 1.0 and canvas.shape[-1] == size and bool((aspect == 1).all()):
        return canvas
    width, height = (1 / aspect).clamp(max=1) * crop, aspect.clamp(max=1) * crop
    crops = torch.stack([1 - width, 1 - height, 1 + width, 1 + height], dim=1) / 2
    return resample(canvas, crops, size).mul_(255).round_().to(torch.uint8)


def _uniform(shape: tuple[int, ...], generator: torch.Generator, device: torch.device) -> Tensor:
    return torch.rand(shape, generator=generator, device=device)


def _bernoulli(count: int, probability: float, generator: torch.Generator, device: torch.device) -> Tensor:
    return _uniform((count,), generator, device) < probability


def _symmetric_beta(shape: tuple[int, ...], beta: float, generator: torch.Generator, device: torch.device) -> Tensor:
    """Draws of Beta(beta, beta): g1 / (g1 + g2) of two Gamma draws (torch's Beta takes no generator)."""
    concentration = torch.full((2, *shape), beta, device=device)
    gamma = torch._standard_gamma(concentration, generator=generator)
    return gamma[0] / gamma.sum(dim=0).clamp_min(1e-30)


def _hue_rotation(angle: Tensor) -> Tensor:
    """(N, 3, 3) rotations about the grey axis by `angle` (N,) radians (Rodrigues)."""
    axis = 1 / math.sqrt(3)
    cos, sin = torch.cos(angle)[:, None, None], torch.sin(angle)[:, None, None]
    cross = torch.tensor([[0.0, -axis, axis], [axis, 0.0, -axis], [-axis, axis, 0.0]], device=angle.device)
    eye = torch.eye(3, device=angle.device)
    return cos * eye + sin * cross + (1 - cos) / 3
