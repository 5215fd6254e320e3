from __future__ import annotations

import pytest
import torch
from small_codecs import create_codec, random_images, with_options

from data_pipeline.views import normalize
from pretrain.config import StageConfig
from pretrain.objectives import (
    CompressionObjective,
    balanced,
    bits_per_pixel,
    l1_distance,
    mse_distance,
    tail_distances,
)


def test_bits_per_pixel__one_bit_a_symbol():
    images = torch.zeros(2, 3, 8, 8)
    likelihoods = [torch.full((2, 4, 2, 2), 0.5), torch.full((2, 1, 1, 1), 0.25)]
    expected = (2 * 16 * 1 + 2 * 1 * 2) / (2 * 64)
    assert bits_per_pixel(likelihoods, images).mean().item() == pytest.approx(expected)


@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e2])
def test_distances__relative_ones_do_not_depend_on_scale(scale: float):
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(2, 3, 4, 4, generator=generator)
    output = target + 0.1 * torch.randn(2, 3, 4, 4, generator=generator)
    for distance in (l1_distance, mse_distance):
        assert distance(scale * output, scale * target, True).item() == pytest.approx(
            distance(output, target, True).item(), rel=1e-4
        )


def test_distances__absolute_values():
    assert l1_distance(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 5.0]), False).item() == pytest.approx(1.5)
    assert mse_distance(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 5.0]), False).item() == pytest.approx(2.5)


@pytest.mark.parametrize("size", [64, 96])
def test_compression_objective__is_of_the_image_alone(size: int):
    """Views that are no multiple of 64 are padded for the networks; neither rate nor distortion counts the padding."""
    codec = create_codec().requires_grad_(False)
    codec.update()
    view = normalize(random_images(2, size, size).float() / 255)
    stage = StageConfig(name="codec", trains=["compression"], rate=1.0, distortion=1.0)
    losses, output = CompressionObjective(codec, stage)(view, torch.tensor(1.0)), codec(view)
    assert output.f3.shape[-2:] == (size // 4, size // 4)
    bpp = bits_per_pixel([output.likelihoods[name] for name in ("y2", "z")], view).mean()
    torch.testing.assert_close(losses.parts["bpp"], bpp)
    torch.testing.assert_close(losses.parts["distortion"], mse_distance(output.f3, output.f2, False))


def test_mse_distance__shares_weigh_images():
    output, target = torch.tensor([[1.0, 3.0], [0.0, 0.0]]), torch.tensor([[2.0, 5.0], [0.0, 4.0]])
    assert mse_distance(output, target, False, torch.ones(2)).item() == pytest.approx((2.5 + 8) / 2)
    assert mse_distance(output, target, False, torch.tensor([2.0, 0.5])).item() == pytest.approx((5 + 4) / 2)


def test_compression_objective__rates_share_by_their_weights():
    """With one image a batch, the loss is that of its rate alone, times its share."""
    codec = with_options(create_codec(), rate_points=3)
    codec.update()
    view = normalize(random_images(1, 64, 64).float() / 255)
    rates = torch.tensor([8.0, 1.0, 0.25])
    stage = StageConfig(
        name="codec",
        trains=["compression"],
        rates=rates.tolist(),
        balance=0.3,
        distortion=0.5,
        features=[1.0, 2.0, 4.0],
    )
    expected = []
    for weight, share, rate in zip(rates, balanced(rates, 0.3), (0.0, 0.5, 1.0), strict=True):
        output = codec(view, rate)
        bits = bits_per_pixel([output.likelihoods[name] for name in ("y2", "z")], view)[0]
        fidelity, _ = tail_distances(codec.backbone, output.f3, output.f2, stage)
        cost = weight * bits + 0.5 * mse_distance(output.f3, output.f2, False) + fidelity
        expected.append(float(share * cost))
    objective, drawn = CompressionObjective(codec, stage), set()
    for seed in range(12):
        torch.manual_seed(seed)
        point = int(torch.randint(3, (1,)))
        torch.manual_seed(seed)
        assert float(objective(view, torch.tensor(1.0)).total) == pytest.approx(expected[point], rel=1e-4)
        drawn.add(point)
    assert drawn == {0, 1, 2}


def test_balanced__shares_average_one_and_fall_with_the_weight():
    shares = balanced(torch.tensor([32.0, 1.0]), 0.4)
    assert shares.mean().item() == pytest.approx(1)
    assert (shares[1] / shares[0]).item() == pytest.approx(32**0.4)
