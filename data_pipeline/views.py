"""From canvases to augmented views, batched, on the device of the batch.

A crop is (x0, y0, x1, y1) in 0..1 of the canvas; the canvas is the image squashed to a square, so one resampling
crops, restores the true proportions and scales. Brightness, contrast, saturation, hue and greyscale of an image are
one affine map of its colours, a 3x4 matrix; the Gaussian blur is separable with one kernel an image. Every draw
comes from the generator that is passed in: views are a pure function of (batch, options, generator state).

Sources: RandomResizedCrop (Szegedy et al. 2015), the augmentations of MoCo v2 (Chen et al. 2020), centre-suppressed
sampling of crops by a Beta distribution (Peng et al. 2022, ContrastiveCrop).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
LUMA = (0.2989, 0.587, 0.114)  # torchvision's rgb_to_grayscale
CROP_ATTEMPTS = 10  # as RandomResizedCrop


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


def whole_boxes(num_boxes: int, device: torch.device | None = None) -> Tensor:
    """(N, 4) boxes of the whole canvas."""
    return torch.tensor([0.0, 0.0, 1.0, 1.0], device=device).repeat(num_boxes, 1)


def crop_sizes(aspect: Tensor, config: ViewConfig, generator: torch.Generator) -> Tensor:
    """(N, 2) widths and heights of crops in 0..1 of the canvas, RandomResizedCrop's distribution.

    Area and aspect ratio are drawn until the crop fits into the image, ten times at most; where none fits, the
    largest central crop within the ratios is taken.
    """
    shape, device = (len(aspect), CROP_ATTEMPTS), aspect.device
    area = config.scale_min + (config.scale_max - config.scale_min) * _uniform(shape, generator, device)
    log_min, log_max = math.log(config.ratio_min), math.log(config.ratio_max)
    ratio = torch.exp(log_min + (log_max - log_min) * _uniform(shape, generator, device))
    image_ratio = aspect[:, None]
    # In a canvas of unit sides: width * height = area and width * aspect / height = ratio.
    width = torch.sqrt(area * ratio / image_ratio)
    height = torch.sqrt(area * image_ratio / ratio)
    fits = (width <= 1) & (height <= 1)
    first = fits.float().argmax(dim=1, keepdim=True)
    fallback_ratio = aspect.clamp(config.ratio_min, config.ratio_max)
    fallback = torch.stack([(fallback_ratio / aspect).clamp(max=1), (aspect / fallback_ratio).clamp(max=1)], dim=1)
    drawn = torch.cat([width.gather(1, first), height.gather(1, first)], dim=1)
    return torch.where(fits.any(dim=1, keepdim=True), drawn, fallback)


def random_crops(aspect: Tensor, config: ViewConfig, generator: torch.Generator) -> Tensor:
    """(N, 4) crops, anywhere in the image, of images with the given aspects (N,)."""
    size = crop_sizes(aspect, config, generator)
    corner = _uniform((len(aspect), 2), generator, aspect.device) * (1 - size)
    return torch.cat([corner, corner + size], dim=1)


def guided_crops(boxes: Tensor, aspect: Tensor, config: ViewConfig, generator: torch.Generator) -> Tensor:
    """(N, 4) crops whose centres are drawn from Beta(beta, beta) along both sides of boxes (N, 4).

    A crop that would leave the image is moved back into it, so its centre may then lie nearer to the middle.
    """
    size = crop_sizes(aspect, config, generator)
    place = _symmetric_beta((len(aspect), 2), config.beta, generator, aspect.device)
    centre = boxes[:, :2] + place * (boxes[:, 2:] - boxes[:, :2])
    corner = torch.minimum((centre - size / 2).clamp(min=0), 1 - size)
    return torch.cat([corner, corner + size], dim=1)


def resample(canvas: Tensor, crops: Tensor, size: int, flip: Tensor | None = None) -> Tensor:
    """Crops (N, 4) of canvases (N, 3, S, S) uint8 as (N, 3, size, size) float32 in 0..1, by one resampling.

    Bilinear. Where every crop of the batch shrinks to less than half, the canvas is halved by area averages first,
    as often as that holds, which keeps aliasing below that of one bilinear step. `flip` (N,) mirrors left and right.
    """
    images = canvas.float().div_(255) if canvas.dtype == torch.uint8 else canvas
    sides = crops[:, 2:] - crops[:, :2]
    while images.shape[-1] % 2 == 0 and float(sides.min()) * images.shape[-1] >= 2 * size:
        images = F.avg_pool2d(images, 2)
    # grid_sample without align_corners: -1 and 1 are the outer edges of the corner pixels.
    centre = crops[:, :2] + crops[:, 2:] - 1
    x_scale = sides[:, 0] if flip is None else torch.where(flip, -sides[:, 0], sides[:, 0])
    zero = torch.zeros_like(x_scale)
    theta = torch.stack([x_scale, zero, centre[:, 0], zero, sides[:, 1], centre[:, 1]], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(theta, [len(crops), 3, size, size], align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def colour_matrices(means: Tensor, config: ViewConfig, generator: torch.Generator) -> Tensor:
    """(N, 3, 4) maps of colour: brightness, then contrast about the mean grey, saturation, hue, greyscale.

    `means` (N, 3) are the images' mean colours. Hue is a rotation about the grey axis by its angle, the linear
    approximation of a turn of HSV's hue; intermediate values are not clipped.
    """
    count, device = len(means), means.device
    luma = torch.tensor(LUMA, device=device)
    eye = torch.eye(3, device=device).expand(count, 3, 3)
    grey = luma.expand(3, 3)
    jittered = _bernoulli(count, config.jitter_probability, generator, device)

    def factors(strength: float) -> Tensor:
        drawn = 1 + strength * (2 * _uniform((count,), generator, device) - 1)
        return torch.where(jittered, drawn, torch.ones_like(drawn))[:, None, None]

    brightness, contrast, saturation = (
        factors(config.brightness),
        factors(config.contrast),
        factors(config.saturation),
    )
    angle = (2 * _uniform((count,), generator, device) - 1) * (2 * math.pi * config.hue)
    hue = _hue_rotation(torch.where(jittered, angle, torch.zeros_like(angle)))
    colour = hue @ (saturation * eye + (1 - saturation) * grey)
    grey_chosen = _bernoulli(count, config.grey_probability, generator, device)[:, None, None]
    colour = torch.where(grey_chosen, grey @ colour, colour)
    linear = colour @ (contrast * brightness * eye)
    mean_grey = ((means * brightness[:, :, 0]) @ luma)[:, None]
    offset = (1 - contrast[:, :, 0]) * mean_grey * colour.sum(dim=2)
    return torch.cat([linear, offset[:, :, None]], dim=2)


def apply_colour(images: Tensor, matrices: Tensor) -> Tensor:
    """Map the colours of (N, 3, H, W) by (N, 3, 4), clipped to 0..1."""
    count, _, height, width = images.shape
    flat = torch.baddbmm(matrices[:, :, 3:], matrices[:, :, :3], images.reshape(count, 3, -1))
    return flat.clamp_(0, 1).view(count, 3, height, width)


def gaussian_blur(images: Tensor, sigmas: Tensor) -> Tensor:
    """Blur (N, 3, H, W) by a separable Gaussian of `sigmas` (N,) pixels; zero leaves an image as it is."""
    radius = max(1, math.ceil(3 * float(sigmas.max())))
    radius = min(radius, images.shape[-1] - 1, images.shape[-2] - 1)
    taps = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
    kernels = torch.exp(-0.5 * (taps / sigmas.clamp_min(1e-3)[:, None]) ** 2)
    kernels = (kernels / kernels.sum(dim=1, keepdim=True)).repeat_interleave(3, dim=0)[:, None]
    count, _, height, width = images.shape
    planes = F.pad(images, (radius, radius, radius, radius), mode="reflect").flatten(0, 1)[None]
    planes = F.conv2d(planes, kernels[:, :, None], groups=3 * count)
    planes = F.conv2d(planes, kernels[:, :, :, None], groups=3 * count)
    return planes.view(count, 3, height, width)


def photometric(images: Tensor, config: ViewConfig, generator: torch.Generator) -> Tensor:
    """Colour map and blur of (N, 3, H, W) in 0..1, with parameters of its own for each image."""
    count, device = len(images), images.device
    images = apply_colour(images, colour_matrices(images.mean(dim=(2, 3)), config, generator))
    blurred = _bernoulli(count, config.blur_probability, generator, device).nonzero()[:, 0]
    low, high = config.blur_sigma_min, config.blur_sigma_max
    sigmas = (low + (high - low) * _uniform((count,), generator, device)) * (images.shape[-1] / 224)
    if len(blurred):
        images[blurred] = gaussian_blur(images[blurred], sigmas[blurred])
    return images


def normalize(images: Tensor) -> Tensor:
    """(N, 3, H, W) in 0..1 to zero mean and unit variance by ImageNet's statistics."""
    mean = torch.tensor(IMAGENET_MEAN, device=images.device).view(3, 1, 1)
    std = torch.tensor(IMAGENET_STD, device=images.device).view(3, 1, 1)
    return (images - mean) / std


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
    count = len(canvas)
    crops = [
        random_crops(aspect, config, generator) if boxes is None else guided_crops(boxes, aspect, config, generator)
        for _ in range(2)
    ]
    flip = _bernoulli(2 * count, config.flip_probability, generator, canvas.device)
    images = canvas.float().div_(255)
    views = torch.cat([resample(images, crops[i], size, flip[i * count : (i + 1) * count]) for i in range(2)])
    views = normalize(photometric(views, config, generator))
    return views[:count], views[count:], torch.stack(crops, dim=1)


def center_images(canvas: Tensor, aspect: Tensor, size: int, crop: float = 1.0) -> Tensor:
    """(N, 3, size, size) uint8: the central square of each true image, `crop` of its short side, for evaluation.

    A square image of `size` pixels comes unchanged.
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


def _symmetric_beta(
    shape: tuple[int, ...], beta: float, generator: torch.Generator, device: torch.device
) -> Tensor:
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
