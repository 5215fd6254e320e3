from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from downstream.errors import TaskError
from downstream.transform import TRANSFORMS, LatentTransform


@pytest.mark.parametrize("kind", TRANSFORMS)
def test_transform__goes_from_a_sixteenth_to_a_quarter(kind: str):
    transform = LatentTransform(kind, 12, 20, width=8)
    assert transform(torch.randn(2, 12, 4, 6)).shape == (2, 20, 16, 24)


@pytest.mark.parametrize("kind", TRANSFORMS)
@pytest.mark.parametrize("channels", [[0, 5, 11], [7], list(range(12))])
def test_transform__of_some_channels_is_that_of_the_others_at_zero(kind: str, channels: list[int]):
    """What a receiver computes from the channels that were sent is what training computed with a mask."""
    torch.manual_seed(0)
    transform = LatentTransform(kind, 12, 20, width=8).eval()
    latents, masked = torch.randn(1, 12, 4, 4), torch.zeros(1, 12, 4, 4)
    masked[:, channels] = latents[:, channels]
    assert torch.allclose(transform(latents[:, channels], channels), transform(masked), atol=1e-5)


@pytest.mark.parametrize("kind", TRANSFORMS)
def test_transform__channels_that_were_not_sent_cost_nothing(kind: str):
    transform = LatentTransform(kind, 192, 20).eval()

    def first_layer(count: int) -> int:
        counter = FlopCounterMode(display=False)
        with counter:
            transform(torch.zeros(1, count, 4, 4), list(range(count)))
        return counter.get_total_flops()

    assert first_layer(192) - first_layer(16) == pytest.approx(176 / 16 * (first_layer(32) - first_layer(16)))


def test_transform__res_has_about_twice_the_multiply_adds_of_deconv():
    """As in Liu's Table 2, 202 G to 94 G."""
    macs = {}
    for kind in TRANSFORMS:
        counter = FlopCounterMode(display=False)
        with counter, torch.device("meta"):
            LatentTransform(kind, 192, 256)(torch.empty(1, 192, 32, 64))
        macs[kind] = counter.get_total_flops()
    assert 1.8 <= macs["res"] / macs["deconv"] <= 2.3


def test_transform__unknown_kind():
    with pytest.raises(TaskError, match="deconv, res"):
        LatentTransform("unet", 12, 20)
