"""Views: each operation against torchvision's, the distribution of crops, and what determinism means."""

from __future__ import annotations

import math

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torch import Tensor
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as reference

from data_pipeline.errors import DataError
from data_pipeline.views import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    ColourJitter,
    Photometric,
    ViewConfig,
    apply_colour,
    center_images,
    colour_matrices,
    draw_colour_jitter,
    draw_photometric,
    gaussian_blur,
    guided_crops,
    normalize,
    photometric,
    random_crops,
    resample,
    two_views,
    whole_boxes,
)

CPU = torch.device("cpu")
LEVEL = 1 / 255


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(count: int = 4, size: int = 32, seed: int = 0) -> Tensor:
    """(N, 3, size, size) uint8 with the statistics that matter here: smooth shapes, edges, moderate colours."""
    rng = np.random.default_rng(seed)
    images = []
    for _ in range(count):
        image = cv2.resize(
            rng.integers(50, 200, (5, 5, 3), dtype=np.uint8), (size, size), interpolation=cv2.INTER_CUBIC
        )
        for _ in range(4):
            centre = tuple(int(x) for x in rng.integers(0, size, 2))
            colour = tuple(int(x) for x in rng.integers(90, 160, 3))
            cv2.circle(image, centre, int(size * rng.uniform(0.05, 0.25)), colour, -1)
        images.append(image)
    return torch.from_numpy(np.stack(images).transpose(0, 3, 1, 2).copy())


def unit(images: Tensor) -> Tensor:
    return images.float() / 255


def neutral(count: int, **changes: list[float]) -> ColourJitter:
    one, zero = torch.ones(count), torch.zeros(count)
    jitter = ColourJitter(one, one, one, zero, torch.zeros(count, dtype=torch.bool))
    return jitter._replace(**{name: torch.tensor(values) for name, values in changes.items()})


def coloured(images: Tensor, jitter: ColourJitter) -> Tensor:
    return apply_colour(images, colour_matrices(images.mean(dim=(2, 3)), jitter))


FACTORS = [0.6, 0.9, 1.2, 1.4]


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("brightness", reference.adjust_brightness),
        ("contrast", reference.adjust_contrast),
        ("saturation", reference.adjust_saturation),
    ],
)
def test_colour_matrices__one_change_equals_torchvision(name: str, function) -> None:
    images = unit(pictures())
    wanted = torch.stack([function(image, factor) for image, factor in zip(images, FACTORS, strict=True)])
    assert (coloured(images, neutral(4, **{name: FACTORS})) - wanted).abs().max() < 2 * LEVEL


def test_colour_matrices__greyscale_equals_torchvision() -> None:
    images = unit(pictures())
    wanted = reference.rgb_to_grayscale(images, num_output_channels=3).clone()
    wanted[2] = images[2]
    ours = coloured(images, neutral(4, grey=[True, True, False, True]))
    assert (ours - wanted).abs().max() < 2 * LEVEL


def test_colour_matrices__all_changes_at_once_equal_torchvisions_one_after_another() -> None:
    images = unit(pictures()) * 0.4 + 0.2  # so that nothing is clipped on the way
    jitter = neutral(4, brightness=[0.8, 1.2, 1.1, 0.7], contrast=[1.3, 0.7, 1, 1.4], saturation=FACTORS)
    jitter = jitter._replace(grey=torch.tensor([False, False, True, False]))
    wanted = []
    for image, brightness, contrast, saturation, grey in zip(
        images, jitter.brightness, jitter.contrast, jitter.saturation, jitter.grey, strict=True
    ):
        image = reference.adjust_contrast(reference.adjust_brightness(image, float(brightness)), float(contrast))
        image = reference.adjust_saturation(image, float(saturation))
        wanted.append(reference.rgb_to_grayscale(image, 3) if grey else image)
    assert (coloured(images, jitter) - torch.stack(wanted)).abs().max() < 2 * LEVEL


@pytest.mark.parametrize("hue", [-0.1, -0.03, 0.05, 0.1])
def test_colour_matrices__hue_is_near_torchvisions_and_nearer_than_no_change(hue: float) -> None:
    images = unit(pictures(8))
    grey = reference.rgb_to_grayscale(images, num_output_channels=3)
    images = grey + 0.55 * (images - grey)  # as colourful as photographs: channels spread over 33 of 255
    wanted = reference.adjust_hue(images, hue)
    error = (coloured(images, neutral(8, hue=[hue] * 8)) - wanted).square().mean().sqrt()
    assert error < 8 * LEVEL  # a rotation in RGB is not HSV's turn: this is the stated tolerance
    assert error < 0.8 * (images - wanted).square().mean().sqrt()


def test_draw_colour_jitter__has_the_configured_frequencies_and_ranges() -> None:
    config = ViewConfig(brightness=0.3, contrast=0.2, saturation=0.1, hue=0.05)
    jitter = draw_colour_jitter(5000, config, seeded(), CPU)
    changed = jitter.brightness != 1
    assert float(changed.float().mean()) == pytest.approx(config.jitter_probability, abs=0.02)
    assert float(jitter.grey.float().mean()) == pytest.approx(config.grey_probability, abs=0.02)
    for values, middle, strength in zip(jitter[:4], (1, 1, 1, 0), (0.3, 0.2, 0.1, 0.05), strict=True):
        assert torch.equal(values != middle, changed)  # all four or none, as RandomApply([ColorJitter])
        uniform = stats.kstest(values[changed].numpy(), stats.uniform(middle - strength, 2 * strength).cdf)
        assert uniform.pvalue > 0.01


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 2.0])
def test_gaussian_blur__equals_torchvision(sigma: float) -> None:
    images = unit(pictures())
    wanted = reference.gaussian_blur(images, [13, 13], [sigma, sigma])
    assert (gaussian_blur(images, torch.full((4,), sigma), 6) - wanted).abs().max() < 1e-5


def test_gaussian_blur__takes_a_sigma_an_image() -> None:
    images = unit(pictures())
    sigmas = torch.tensor([0.0, 0.7, 1.5, 2.0])
    ours = gaussian_blur(images, sigmas, 6)
    assert (ours[0] - images[0]).abs().max() < 1e-6
    for number in range(1, 4):
        wanted = reference.gaussian_blur(images[number], [13, 13], [float(sigmas[number])] * 2)
        assert (ours[number] - wanted).abs().max() < 1e-5


def test_normalize__equals_torchvision() -> None:
    images = unit(pictures())
    assert (normalize(images) - reference.normalize(images, IMAGENET_MEAN, IMAGENET_STD)).abs().max() < 1e-6


def drawn(images: torch.Tensor, config: ViewConfig) -> Photometric:
    """Parameters for `images`."""
    return draw_photometric(len(images), images.shape[-1], config, seeded(), CPU)


def test_photometric__does_nothing_where_nothing_is_asked_and_leaves_its_input() -> None:
    images = unit(pictures())
    before = images.clone()
    off = ViewConfig(jitter_probability=0, grey_probability=0, blur_probability=0)
    assert (photometric(images, drawn(images, off)) - images).abs().max() < 1e-6
    photometric(images, drawn(images, ViewConfig(blur_probability=1)))
    assert torch.equal(images, before)


def test_photometric__blurs_the_configured_share_of_images() -> None:
    images = unit(pictures(1, 16)).repeat(2000, 1, 1, 1)
    config = ViewConfig(jitter_probability=0, grey_probability=0, blur_sigma_min=4, blur_sigma_max=8)
    changed = (photometric(images, drawn(images, config)) - images).abs().amax(dim=(1, 2, 3)) > LEVEL
    assert float(changed.float().mean()) == pytest.approx(0.5, abs=0.04)


def test_photometric__keeps_its_precision_under_autocast() -> None:
    images = unit(pictures())
    plain = photometric(images, drawn(images, ViewConfig()))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(photometric(images, drawn(images, ViewConfig())), plain)


@pytest.mark.parametrize("aspect", [1.0, 1.5, 0.4, 2.6])
def test_random_crops__are_distributed_as_torchvisions(aspect: float) -> None:
    count, height = 3000, 20_000
    width = round(height * aspect)
    torch.manual_seed(0)
    image = torch.empty(1, 1, 1).expand(3, height, width)
    drawn = np.array([RandomResizedCrop.get_params(image, (0.2, 1.0), (3 / 4, 4 / 3)) for _ in range(count)])
    top, left, h, w = (drawn / [height, width, height, width]).T
    crops = random_crops(torch.full((count,), aspect), ViewConfig(), seeded()).double().numpy()
    x0, y0, x1, y1 = crops.T
    pairs = {"left": (left, x0), "top": (top, y0), "width": (w, x1 - x0), "height": (h, y1 - y0),
             "area": (w * h, (x1 - x0) * (y1 - y0)), "centre": (left + w / 2, (x0 + x1) / 2)}  # fmt: skip
    for name, (theirs, ours) in pairs.items():
        # To three digits: crops that fit in none of ten draws are all alike, and torchvision's lie on whole pixels.
        assert stats.ks_2samp(theirs.round(3), ours.round(3)).pvalue > 0.005, name


@pytest.mark.parametrize("aspect", [9.0, 0.1])
def test_random_crops__where_none_fits_are_central_as_torchvisions(aspect: float) -> None:
    image = torch.empty(1, 1, 1).expand(3, 3000, round(3000 * aspect))
    scale = (0.9, 1.0)
    top, left, height, width = RandomResizedCrop.get_params(image, scale, (3 / 4, 4 / 3))
    h, w = image.shape[1:]
    crop = random_crops(torch.tensor([aspect]), ViewConfig(scale_min=scale[0]), seeded())[0]
    assert crop.tolist() == pytest.approx([left / w, top / h, (left + width) / w, (top + height) / h], abs=1e-3)


@pytest.mark.parametrize("guided", [False, True])
def test_crops__lie_in_the_image_with_the_area_and_ratio_asked_for(guided: bool) -> None:
    aspect = torch.exp(torch.empty(3000).uniform_(-0.7, 0.7, generator=seeded(1)))
    config = ViewConfig()
    boxes = torch.rand(3000, 2, 2, generator=seeded(2)).sort(dim=1).values.flatten(1)
    crops = guided_crops(boxes, aspect, config, seeded()) if guided else random_crops(aspect, config, seeded())
    assert crops.shape == (3000, 4) and crops.dtype == torch.float32
    assert crops.min() >= 0 and crops.max() <= 1
    width, height = crops[:, 2] - crops[:, 0], crops[:, 3] - crops[:, 1]
    assert (width > 0).all() and (height > 0).all()
    area, ratio = width * height, width * aspect / height
    assert area.min() >= 0.2 - 1e-4 and area.max() <= 1 + 1e-4
    assert ratio.min() >= 3 / 4 - 1e-3 and ratio.max() <= 4 / 3 + 1e-3


def test_guided_crops__centres_lie_in_the_box_unless_the_image_ends() -> None:
    boxes = torch.rand(3000, 2, 2, generator=seeded(2)).sort(dim=1).values.flatten(1)
    crops = guided_crops(boxes, torch.ones(3000), ViewConfig(scale_max=0.6), seeded())
    for low, high in ((0, 2), (1, 3)):
        centre = (crops[:, low] + crops[:, high]) / 2
        inside = (centre >= boxes[:, low] - 1e-5) & (centre <= boxes[:, high] + 1e-5)
        moved = (crops[:, low] <= 1e-5) | (crops[:, high] >= 1 - 1e-5)
        assert (inside | moved).all()
        assert inside.float().mean() > 0.5
        # One that was moved would otherwise have left the image: it stands at the edge that is nearer to its box.
        box_centre = (boxes[:, low] + boxes[:, high]) / 2
        outside = ~inside
        assert torch.equal((crops[outside, low] <= 1e-5), box_centre[outside] < 0.5)


def test_guided_crops__centres_follow_the_beta_distribution() -> None:
    boxes = torch.tensor([[0.3, 0.4, 0.7, 0.6]]).repeat(3000, 1)
    config = ViewConfig(scale_min=0.01, scale_max=0.02)
    crops = guided_crops(boxes, torch.ones(3000), config, seeded())
    for low, high, start, side in ((0, 2, 0.3, 0.4), (1, 3, 0.4, 0.2)):
        place = ((crops[:, low] + crops[:, high]) / 2 - start) / side
        assert stats.kstest(place.clamp(0, 1).numpy(), stats.beta(0.6, 0.6).cdf).pvalue > 0.01


def test_whole_boxes__span_the_canvas() -> None:
    assert whole_boxes(2).tolist() == [[0, 0, 1, 1]] * 2


def test_resample__the_whole_canvas_at_its_size_is_the_canvas() -> None:
    canvas = pictures()
    assert (resample(canvas, whole_boxes(4), 32) - unit(canvas)).abs().max() < 1e-4
    assert (resample(unit(canvas), whole_boxes(4), 32) - unit(canvas)).abs().max() < 1e-4


@pytest.mark.parametrize("size", [32, 48, 17])
def test_resample__equals_torchvisions_resized_crop_where_it_does_not_shrink(size: int) -> None:
    canvas = pictures()
    boxes = [(0, 0, 16, 16), (3, 5, 10, 14), (16, 16, 16, 16), (0, 11, 9, 12)]  # left, top, width, height
    crops = torch.tensor([[x, y, x + w, y + h] for x, y, w, h in boxes]) / 32
    ours = resample(canvas, crops, size)
    for number, (x, y, w, h) in enumerate(boxes):
        wanted = reference.resized_crop(unit(canvas[number]), y, x, h, w, [size, size], antialias=False)
        # Inside: at a crop's edge ours sees the pixels beyond it, torchvision's repeats the last one.
        margin = math.ceil(size / min(w, h) / 2) + 1
        inside = slice(margin, -margin)
        assert (ours[number] - wanted)[:, inside, inside].abs().max() < 2 * LEVEL


@pytest.mark.parametrize("shrink", [1.25, 1.6, 2.0, 2.5, 3.0, 4.0])
def test_resample__shrinks_as_an_antialiased_filter_does(shrink: float) -> None:
    canvas, size = pictures(6, 128), 32
    side = round(size * shrink)
    start = (128 - side) // 2
    crops = torch.tensor([[start, start, start + side, start + side]]).repeat(6, 1) / 128
    wanted = reference.resized_crop(unit(canvas), start, start, side, side, [size, size], antialias=True)
    error = (resample(canvas, crops, size) - wanted).square().mean().sqrt()
    assert error < 6 * LEVEL


def test_resample__fine_stripes_do_not_alias() -> None:
    stripes = torch.zeros(1, 3, 128, 128)
    stripes[..., ::2] = 1
    small = resample(torch.cat([stripes, stripes]), torch.tensor([[0, 0, 1, 1], [0.1, 0.1, 0.3, 0.3]]), 32)
    assert (small[0] - 0.5).abs().max() < 0.05  # also beside a crop that does not shrink


@pytest.mark.parametrize("side", [127, 33, 5])
def test_resample__odd_canvases_are_halved_in_place(side: int) -> None:
    ramp = torch.linspace(0.5 / side, 1 - 0.5 / side, side).expand(1, 3, side, side)
    small = resample(ramp, whole_boxes(1), 2)
    assert small[0, 0, 0].tolist() == pytest.approx([0.25, 0.75], abs=0.06)


def test_resample__flips_the_chosen_images() -> None:
    canvas, crops = pictures(), random_crops(torch.ones(4), ViewConfig(), seeded())
    plain = resample(canvas, crops, 24)
    flipped = resample(canvas, crops, 24, torch.tensor([True, False, True, False]))
    wanted = torch.stack([plain[0].flip(-1), plain[1], plain[2].flip(-1), plain[3]])
    assert (flipped - wanted).abs().max() < 1e-4


def test_two_views__are_a_function_of_the_generator() -> None:
    canvas, aspect, config = pictures(8), torch.linspace(0.5, 2, 8), ViewConfig()
    first = two_views(canvas, aspect, 24, config, seeded(7))
    again = two_views(canvas, aspect, 24, config, seeded(7))
    other = two_views(canvas, aspect, 24, config, seeded(8))
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    view0, view1, crops = first
    assert view0.shape == view1.shape == (8, 3, 24, 24) and view0.dtype == torch.float32
    assert view0.is_contiguous() and crops.shape == (8, 2, 4)
    assert not torch.equal(view0, view1)


def test_two_views__an_image_does_not_see_its_neighbours() -> None:
    canvas, aspect = pictures(6, 96), torch.ones(6)
    views = two_views(canvas, aspect, 24, ViewConfig(), seeded())
    changed = canvas.clone()
    changed[3] = 255 - changed[3]
    others = [0, 1, 2, 4, 5]
    for view, then in zip(views[:2], two_views(changed, aspect, 24, ViewConfig(), seeded()), strict=False):
        assert torch.equal(view[others], then[others])
        assert not torch.equal(view[3], then[3])


def test_two_views__show_the_crops_they_name() -> None:
    config = ViewConfig(jitter_probability=0, grey_probability=0, blur_probability=0, flip_probability=0)
    canvas, boxes = pictures(), torch.tensor([[0.2, 0.2, 0.4, 0.5]]).repeat(4, 1)
    for guide in (None, boxes):
        *views, crops = two_views(canvas, torch.ones(4), 24, config, seeded(), guide)
        for number, view in enumerate(views):
            assert (view - normalize(resample(canvas, crops[:, number], 24))).abs().max() < 1e-4


def test_two_views__with_boxes_look_where_the_boxes_are() -> None:
    boxes = torch.tensor([[0.0, 0.0, 0.3, 0.3]]).repeat(300, 1)
    canvas = pictures(1, 16).expand(300, -1, -1, -1)
    guided = two_views(canvas, torch.ones(300), 16, ViewConfig(), seeded(), boxes)[2]
    free = two_views(canvas, torch.ones(300), 16, ViewConfig(), seeded())[2]
    assert guided[..., :2].mean() < 0.5 * free[..., :2].mean()


def test_center_images__a_square_image_of_the_size_is_unchanged_also_among_others() -> None:
    canvas = pictures()
    assert center_images(canvas, torch.ones(4), 32) is canvas
    mixed = center_images(canvas, torch.tensor([1.0, 1.5, 1.0, 0.5]), 32)
    assert mixed.dtype == torch.uint8
    assert torch.equal(mixed[[0, 2]], canvas[[0, 2]])
    assert not torch.equal(mixed[1], canvas[1])


@pytest.mark.parametrize(("width", "height"), [(96, 64), (64, 80), (64, 64)])
@pytest.mark.parametrize("crop", [1.0, 0.875])
def test_center_images__restore_the_proportions_of_the_image(width: int, height: int, crop: float) -> None:
    pixels = cv2.resize(pictures(1, 96)[0].permute(1, 2, 0).numpy(), (width, height))
    canvas = torch.from_numpy(cv2.resize(pixels, (64, 64))).permute(2, 0, 1)[None]
    ours = center_images(canvas, torch.tensor([width / height]), 64, crop)[0].permute(1, 2, 0).numpy()
    half = min(width, height) * crop / 2
    box = (width / 2 - half, height / 2 - half, width / 2 + half, height / 2 + half)
    wanted = np.asarray(Image.fromarray(pixels).resize((64, 64), Image.Resampling.BILINEAR, box=box))
    assert np.abs(ours.astype(int) - wanted).mean() < 3


@pytest.mark.parametrize(
    "values",
    [
        {"blur_probability": 1.5}, {"flip_probability": -0.1}, {"scale_min": 0.0}, {"scale_max": 1.2},
        {"scale_min": 0.9, "scale_max": 0.5}, {"ratio_min": 2.0}, {"beta": 0.0}, {"hue": 0.6}, {"brightness": -1.0},
        {"blur_sigma_min": 3.0},
    ],
)  # fmt: skip
def test_view_config__refuses_what_cannot_work_by_name(values: dict[str, float]) -> None:
    name, value = next(iter(values.items()))
    with pytest.raises(DataError, match=f"{name}={value:g}"):
        ViewConfig(**values).validate()


def test_view_config__defaults_are_valid() -> None:
    ViewConfig().validate()
