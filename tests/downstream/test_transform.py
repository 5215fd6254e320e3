from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small_codecs import NARROW, wake
from torch.utils.flop_counter import FlopCounterMode

from downstream.errors import TaskError
from downstream.transform import NEW_TRANSFORMS, TRANSFORMS, LatentTransform
from pretrain.codec.transforms import SynthesisTransform


def create(kind: str, in_channels: int) -> LatentTransform:
    synthesis = wake(SynthesisTransform(20, replace(NARROW, latent_channels=in_channels)))
    return LatentTransform(kind, in_channels, 20, width=8, synthesis=synthesis).eval()


@pytest.mark.parametrize("kind", TRANSFORMS)
def test_transform__goes_from_a_sixteenth_to_a_quarter(kind: str):
    transform = create(kind, 16)
    assert transform(torch.randn(2, 16, 4, 6)).shape == (2, 20, 16, 24)


@pytest.mark.parametrize("kind", TRANSFORMS)
@pytest.mark.parametrize("channels", [[0, 5, 11], [7], list(range(16))])
def test_transform__of_some_channels_is_that_of_the_others_at_zero(kind: str, channels: list[int]):
    """What a receiver computes from the channels that were sent is what training computed with a mask."""
    torch.manual_seed(0)
    transform = create(kind, 16)
    latents, masked = torch.randn(1, 16, 4, 4), torch.zeros(1, 16, 4, 4)
    masked[:, channels] = latents[:, channels]
    assert torch.allclose(transform(latents[:, channels], channels), transform(masked), atol=1e-5)


@pytest.mark.parametrize("kind", TRANSFORMS)
def test_transform__channels_that_were_not_sent_cost_nothing(kind: str):
    transform = create(kind, 192)

    def first_layer(count: int) -> int:
        counter = FlopCounterMode(display=False)
        with counter:
            transform(torch.zeros(1, count, 4, 4), list(range(count)))
        return counter.get_total_flops()

    assert first_layer(192) - first_layer(16) == pytest.approx(176 / 16 * (first_layer(32) - first_layer(16)))


def test_transform__res_has_about_twice_the_multiply_adds_of_deconv():
    """As in Liu's Table 2, 202 G to 94 G."""
    macs = {}
    for kind in NEW_TRANSFORMS:
        counter = FlopCounterMode(display=False)
        with counter, torch.device("meta"):
            LatentTransform(kind, 192, 256)(torch.empty(1, 192, 32, 64))
        macs[kind] = counter.get_total_flops()
    assert 1.8 <= macs["res"] / macs["deconv"] <= 2.3


def test_transform__synthesis_begins_as_the_codecs_and_is_a_copy():
    torch.manual_seed(0)
    synthesis = wake(SynthesisTransform(20, replace(NARROW, latent_channels=16))).requires_grad_(False)
    transform, latents = LatentTransform("synthesis", 16, 20, synthesis=synthesis), torch.randn(2, 16, 4, 6)
    assert torch.equal(transform(latents), synthesis(latents))
    transform(latents).square().mean().backward()
    torch.optim.SGD(transform.parameters(), lr=1.0).step()
    assert not torch.equal(transform(latents), synthesis(latents))
    assert all(parameter.grad is None for parameter in synthesis.parameters())


def test_transform__synthesis_of_another_width_or_of_no_codec():
    synthesis = SynthesisTransform(20, NARROW)
    with pytest.raises(TaskError, match="gives 20 channels, the network reads 64"):
        LatentTransform("synthesis", 32, 64, synthesis=synthesis)
    with pytest.raises(TaskError, match="needs latents=codec"):
        LatentTransform("synthesis", 32, 20)


def test_transform__unknown_kind():
    with pytest.raises(TaskError, match="deconv, res"):
        LatentTransform("unet", 12, 20)
