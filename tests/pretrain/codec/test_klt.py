from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from small_codecs import NARROW
from torch import Tensor
from torch.nn.functional import interpolate

from pretrain.codec.entropy import bits_per_image
from pretrain.codec.feature_codec import FeatureCodec
from pretrain.codec.klt import STEPS, Z_STEPS, Components, begin_as_klt, num_images
from pretrain.objectives import mse_distance

# Options, and the share of energy that so many components may lose before anything is rounded.
OPTIONS = [
    ({"transform_channels": 16, "latent_channels": 32}, 0.02),
    ({"transform_channels": 24, "latent_channels": 16, "base_channels": 8}, 0.02),
    ({"rgc_orders": [0, 0, 0], "hyperprior": "conv"}, 0.02),
    ({"rate_points": 3, "context": "space_channel", "base_channels": 0}, 0.02),
]


def codec_of(**options: Any) -> FeatureCodec:
    torch.manual_seed(0)
    return FeatureCodec(replace(NARROW, redundancy=False, **options)).eval()


def maps(seed: int, number: int = 64, channels: int = 64) -> Tensor:
    """Smooth maps about a mean, as features are: most of their energy is in few components."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(number, 3, 3, 3, generator=generator)
    mixture = torch.randn(channels, 3, generator=torch.Generator().manual_seed(0))
    return 1 + interpolate(torch.einsum("oc,nchw->nohw", mixture, coarse), (16, 16), mode="bilinear")


@pytest.mark.parametrize(
    ("options", "lost"), OPTIONS, ids=["narrow inside", "wide inside", "convolutions alone", "all options"]
)
@torch.no_grad()
def test_begin_as_klt__features_pass_from_the_first_step_on(options: dict[str, Any], lost: float):
    codec = codec_of(**options)
    unseen = maps(2)
    nothing = mse_distance(codec.compress_features(unseen)[0], unseen, True)
    begin_as_klt(codec, [maps(0), maps(1)])
    codec.update()
    f3, likelihoods = codec.compress_features(unseen)
    assert mse_distance(codec.g_s(codec.g_a(unseen)), unseen, True) < lost
    assert mse_distance(f3, unseen, True) < 2 * lost + 0.1 < nothing
    # The prior of y2 is that of its components: a Gaussian of four steps has four bits, and few are as wide.
    bits = -likelihoods["y2"].log2().mean((0, 2, 3))
    assert bits[0] < 5 and bits.mean() < 2


@torch.no_grad()
def test_begin_as_klt__components_come_by_falling_energy_in_steps_of_the_quantizer():
    codec = codec_of(transform_channels=16, latent_channels=32)
    features = maps(0)
    begin_as_klt(codec, iter([features]))
    y2 = codec.g_a(features)
    deviations = y2.std((0, 2, 3))
    assert deviations[0].item() == pytest.approx(STEPS, rel=1e-2)
    assert bool((deviations.diff() < 1e-3).all())
    assert float(y2.mean((0, 2, 3)).abs().max()) < 1e-2


@torch.no_grad()
def test_begin_as_klt__what_carries_nothing_yet_can_learn_to():
    """No weight is at a place where neither it nor its neighbours have a gradient."""
    codec = codec_of(transform_channels=16, latent_channels=32).train()
    features = maps(0)
    begin_as_klt(codec, [features])
    with torch.enable_grad():
        f3, likelihoods = codec.compress_features(features)
        (mse_distance(f3, features, True) + bits_per_image(likelihoods.values()).mean()).backward()
    for module in (
        *codec.g_a.convolutions, *codec.g_s.convolutions, *codec.h_a.convolutions, *codec.h_s.convolutions
    ):  # fmt: skip
        assert module.weight.grad is not None
        moved = module.weight.grad.abs().amax((2, 3)) > 0
        dead = ~(moved | (module.weight.abs().amax((2, 3)) > 0))
        assert not dead.any()


@pytest.mark.parametrize("options", [{}, {"hyperprior": "conv"}, {"z_channels": 40}, {"z_channels": 4}])
@torch.no_grad()
def test_begin_as_klt__z_takes_more_bits_off_y2_than_it_costs(options: dict[str, Any]):
    """Neighbours are alike in these maps; without z the prior of y2 has each component's own deviation."""
    codec = codec_of(transform_channels=16, latent_channels=32, **options)
    seen = torch.cat([maps(seed, number=256) for seed in (0, 1)])
    begin_as_klt(codec, [seen])
    assert codec.h_a(codec.g_a(seen)).std((0, 2, 3))[0].item() == pytest.approx(Z_STEPS, rel=1e-2)
    codec.update()
    y2 = codec.g_a(maps(2))
    z = codec.h_a(y2)

    def bits(z: Tensor) -> dict[str, Tensor]:
        _, likelihoods = codec._quantize(y2, z, None, None)
        return {name: -each.log2().sum() for name, each in likelihoods.items()}

    told = bits(z)
    codec.h_s.head.bias.chunk(2)[1].copy_(y2.std((0, 2, 3)).clamp_min(0.11))
    untold = bits(torch.zeros_like(z))
    assert told["y2"] + told["z"] < untold["y2"]


@torch.no_grad()
def test_begin_as_klt__features_that_say_nothing_leave_finite_weights():
    codec = codec_of()
    begin_as_klt(codec, [torch.zeros(8, 64, 16, 16)])
    f3, likelihoods = codec.compress_features(torch.zeros(1, 64, 16, 16))
    assert bool(f3.isfinite().all()) and all(bool(each.isfinite().all()) for each in likelihoods.values())


def test_components__of_known_directions():
    generator = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(12, 12, generator=generator))[0]
    weights = torch.randn(5000, 2, generator=generator) * torch.tensor([3.0, 1.0])
    blocks = (2 + weights @ directions[:, :2].T).reshape(-1, 3, 2, 2)
    found = Components.of(blocks, 2)
    assert found.deviations.tolist() == pytest.approx([3.0, 1.0], rel=0.05)
    torch.testing.assert_close((found.vectors.flatten(1) @ directions[:, :2]).abs(), torch.eye(2), atol=0.02, rtol=0)
    torch.testing.assert_close(found.mean, torch.full((3, 2, 2), 2.0), atol=0.1, rtol=0)


@pytest.mark.parametrize(("size", "images"), [(64, 512), (224, 42), (1024, 2)])
def test_num_images__fewer_of_large_ones(size: int, images: int):
    assert num_images(size) == images
