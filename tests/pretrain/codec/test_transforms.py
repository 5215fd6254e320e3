from __future__ import annotations

import pytest
import torch
from small_codecs import wake
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.flop_counter import FlopCounterMode

from pretrain.codec.config import CodecConfig
from pretrain.codec.gated_conv import RGCBlock
from pretrain.codec.transforms import AnalysisTransform, SynthesisTransform

CHANNELS = 32


def create_transforms(seed: int = 0) -> nn.ModuleList:
    torch.manual_seed(seed)
    config = CodecConfig(transform_channels=16, latent_channels=32)
    return wake(nn.ModuleList([AnalysisTransform(CHANNELS, config), SynthesisTransform(CHANNELS, config)]))


@pytest.mark.parametrize(("height", "width"), [(16, 16), (16, 48), (80, 32)])
@torch.no_grad()
def test_transforms__to_a_quarter_and_back(height: int, width: int):
    g_a, g_s = create_transforms()
    y2 = g_a(torch.randn(2, CHANNELS, height, width))
    assert y2.shape == (2, 32, height // 4, width // 4)
    assert g_s(y2).shape == (2, CHANNELS, height, width)


def test_transforms__every_weight_gets_a_gradient():
    g_a, g_s = transforms = create_transforms()
    f2 = torch.randn(2, CHANNELS, 16, 16, requires_grad=True)
    g_s(g_a(f2)).square().mean().backward()
    assert f2.grad is not None and f2.grad.abs().sum() > 0
    for name, parameter in transforms.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


@torch.no_grad()
def test_transforms__do_not_change_their_input():
    f2 = torch.randn(1, CHANNELS, 16, 16)
    before = f2.clone()
    g_a, g_s = create_transforms()
    y2 = g_a(f2)
    latents = y2.clone()
    g_s(y2)
    assert torch.equal(f2, before)
    assert torch.equal(y2, latents)


@torch.no_grad()
def test_transforms__same_seed_same_result():
    f2 = torch.randn(2, CHANNELS, 16, 16)
    first, second, other = (g_s(g_a(f2)) for g_a, g_s in map(create_transforms, (0, 0, 1)))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_transforms__learn_from_the_first_steps(precision: torch.dtype):
    transforms = create_transforms().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(transforms.parameters(), lr=1e-3)
    f2 = torch.randn(2, CHANNELS, 2, 2).repeat_interleave(4, 2).repeat_interleave(4, 3).relu()
    f2 = f2.contiguous(memory_format=torch.channels_last)
    losses = []
    for _ in range(30):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision is torch.bfloat16):
            f3 = transforms[1](transforms[0](f2))
        loss = mse_loss(f3.float(), f2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert max(losses) < 1.5 * losses[0]


def test_transforms__cost_what_is_said_of_them():
    """3.8 G multiply-adds each at 224 x 224 with the authors' widths."""
    config = CodecConfig()
    with torch.no_grad(), FlopCounterMode(display=False) as analysis:
        y2 = AnalysisTransform(256, config)(torch.zeros(1, 256, 56, 56))
    with torch.no_grad(), FlopCounterMode(display=False) as synthesis:
        SynthesisTransform(256, config)(y2)
    assert y2.shape == (1, 192, 14, 14)
    assert analysis.get_total_flops() / 2e9 == pytest.approx(3.8, rel=0.05)
    assert synthesis.get_total_flops() / 2e9 == pytest.approx(3.8, rel=0.05)


def test_transforms__order_zero_leaves_a_block_out():
    """What the fast configuration saves: no gated convolution at the finest places."""
    torch.manual_seed(0)
    config = CodecConfig(transform_channels=16, latent_channels=16, rgc_orders=[0, 2, 3])
    g_a, g_s = AnalysisTransform(8, config), SynthesisTransform(8, config)
    assert not any(isinstance(module, RGCBlock) for module in (g_a[0], g_s[-1]))
    assert sum(isinstance(module, RGCBlock) for module in g_a) == 2
    y2 = g_a(torch.rand(1, 8, 16, 32))
    assert y2.shape == (1, 16, 4, 8)
    assert g_s(y2).shape == (1, 8, 16, 32)
