from __future__ import annotations

import pytest
import torch
from small_codecs import wake
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pretrain.codec.config import CodecConfig
from pretrain.codec.hyperprior import ConvBlock, HyperAnalysis, HyperSynthesis, ViTBlock, WindowedAttention


def create_config(window: int = 4) -> CodecConfig:
    return CodecConfig(
        latent_channels=16, hyper_dim=24, hyper_heads=2, hyper_head_dim=10, z_channels=8, window=window
    )  # fmt: skip


def create_hyperprior(seed: int = 0) -> nn.ModuleList:
    torch.manual_seed(seed)
    return wake(nn.ModuleList([HyperAnalysis(create_config()), HyperSynthesis(create_config())]))


@pytest.fixture
def attention() -> WindowedAttention:
    torch.manual_seed(0)
    layer = WindowedAttention(24, heads=2, head_dim=10, window=4)
    nn.init.normal_(layer.positions)
    return layer


@pytest.mark.parametrize(("height", "width"), [(4, 4), (4, 8), (12, 20), (36, 4)])
@torch.no_grad()
def test_hyperprior__to_a_quarter_and_back(height: int, width: int):
    h_a, h_s = create_hyperprior()
    z = h_a(torch.randn(2, 16, height, width))
    assert z.shape == (2, 8, height // 4, width // 4)
    means, scales = h_s(z)
    assert means.shape == scales.shape == (2, 16, height, width)
    assert means.isfinite().all() and scales.isfinite().all()


@torch.no_grad()
def test_hyper_synthesis__scales_begin_above_the_lower_bound():
    torch.manual_seed(0)
    _, scales = HyperSynthesis(CodecConfig())(torch.randn(2, 192, 2, 2))
    assert (scales > 0.11).float().mean() > 0.99
    assert scales.mean() == pytest.approx(1, abs=0.3)


def test_hyperprior__every_weight_gets_a_gradient():
    h_a, h_s = hyperprior = create_hyperprior()
    means, scales = h_s(h_a(torch.randn(2, 16, 12, 8)))
    (means.square().mean() + scales.square().mean()).backward()
    for name, parameter in hyperprior.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


@torch.no_grad()
def test_hyperprior__same_seed_same_result():
    y2 = torch.randn(2, 16, 8, 12)
    first, second, other = (h_s(h_a(y2))[0] for h_a, h_s in map(create_hyperprior, (0, 0, 1)))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


@torch.no_grad()
def test_hyperprior__images_of_a_batch_do_not_meet():
    h_a, h_s = create_hyperprior()
    y2 = torch.randn(3, 16, 20, 12)
    together = torch.cat(h_s(h_a(y2)), dim=1)
    alone = torch.cat([torch.cat(h_s(h_a(one[None])), dim=1) for one in y2])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_hyper_synthesis__float64_copy_agrees():
    _, h_s = create_hyperprior()
    z_hat = torch.randn(2, 8, 3, 2)
    single = torch.cat(h_s(z_hat))
    torch.testing.assert_close(torch.cat(h_s.double()(z_hat.double())).float(), single, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("height", "width"), [(4, 4), (8, 8), (6, 5), (9, 4), (3, 11)])
@torch.no_grad()
def test_attention__each_window_as_if_it_were_alone(attention: WindowedAttention, height: int, width: int):
    """Padding of windows at the border leaves no trace."""
    x = torch.randn(3, height, width, 24)
    whole = attention(x)
    assert whole.shape == x.shape
    for top in range(0, height, 4):
        for left in range(0, width, 4):
            place = (slice(None), slice(top, top + 4), slice(left, left + 4))
            torch.testing.assert_close(whole[place], attention(x[place]), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_attention__is_softmax_over_pairs_with_a_bias_of_their_offset(attention: WindowedAttention):
    x = torch.randn(1, 3, 2, 24)
    query, key, value = attention.qkv(x.view(6, 24)).view(6, 3, 2, 10).unbind(1)
    places = [(row, column) for row in range(3) for column in range(2)]
    mixed = torch.empty(6, 2, 10)
    for head in range(2):
        for here, (row, column) in enumerate(places):
            scores = torch.stack(
                [
                    query[here, head] @ key[there, head] / 10**0.5
                    + attention.positions[head, row - other_row + 3, column - other_column + 3]
                    for there, (other_row, other_column) in enumerate(places)
                ]
            )
            mixed[here, head] = scores.softmax(0) @ value[:, head]
    expected = attention.proj(mixed.flatten(1)).view(1, 3, 2, 24)
    torch.testing.assert_close(attention(x), expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_attention__is_global_up_to_the_window():
    torch.manual_seed(0)
    layer = WindowedAttention(24, heads=2, head_dim=10, window=16)
    x = torch.randn(1, 16, 16, 24)
    changed = x.clone()
    changed[:, 0, 0] += 5
    assert ((layer(changed) - layer(x)).abs().amax(dim=(0, 3)) > 0).all()


@pytest.mark.parametrize("block", [ViTBlock, ConvBlock])
@torch.no_grad()
def test_block__begins_as_the_identity_and_does_not_stay_it(block: type[ViTBlock] | type[ConvBlock]):
    begun, x = block(create_config()), torch.randn(2, 24, 6, 5)
    assert torch.equal(begun(x), x)
    assert (wake(begun)(x) - x).abs().mean() > 0.01


@torch.no_grad()
def test_vit_block__runs_under_autocast_in_any_memory_format():
    torch.manual_seed(0)
    block, x = wake(ViTBlock(create_config())), torch.randn(2, 24, 6, 5)
    exact = block(x)
    torch.testing.assert_close(block(x.contiguous(memory_format=torch.channels_last)), exact)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(block(x).float(), exact, atol=0.1, rtol=0.05)


def multiply_adds(module: nn.Module, x: Tensor) -> float:
    with FlopCounterMode(display=False) as count:
        module(x)
    return count.get_total_flops() / 2


def test_hyperprior__cost_grows_with_the_number_of_pixels():
    with torch.device("meta"):
        h_a = HyperAnalysis(CodecConfig())
        small, large = (multiply_adds(h_a, torch.empty(1, 192, side, side)) for side in (64, 256))
    assert large == pytest.approx(16 * small, rel=0.01)
