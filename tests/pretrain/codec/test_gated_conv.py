from __future__ import annotations

import pytest
import torch
from small_codecs import wake
from torch import Tensor, nn

from pretrain.codec.gated_conv import FILTER_SIZE, GlobalLocalFilter, RecursiveGatedConv, RGCBlock
from pretrain.errors import ConfigError

SIZES = [(1, 1), (2, 3), (7, 5), (14, 14), (16, 48)]


def reach(module: nn.Module, x: Tensor) -> Tensor:
    """(H, W) where the output moves when the middle of the input does."""
    changed = x.clone()
    changed[..., x.shape[-2] // 2, x.shape[-1] // 2] += 1 + torch.rand(x.shape[1])
    return (module(changed) - module(x)).abs().amax(dim=(0, 1)) > 1e-7


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize(("order", "global_local"), [(1, False), (2, False), (3, False), (4, True)])
@torch.no_grad()
def test_rgc_block__keeps_any_shape(height: int, width: int, order: int, global_local: bool):
    x = torch.randn(2, 32, height, width)
    assert RGCBlock(32, order, global_local=global_local)(x).shape == x.shape


@torch.no_grad()
def test_rgc_block__begins_as_the_identity():
    x = torch.randn(2, 32, 8, 8)
    torch.testing.assert_close(RGCBlock(32, 4, global_local=True)(x), x, atol=0, rtol=0)


@pytest.mark.parametrize("global_local", [False, True])
def test_rgc_block__reaches_every_weight_with_a_gradient(global_local: bool):
    block = wake(RGCBlock(32, 3, global_local=global_local))
    block(torch.randn(2, 32, 6, 7)).square().mean().backward()
    for name, parameter in block.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


@torch.no_grad()
def test_rgc_block__is_the_same_in_both_memory_formats():
    block, x = wake(RGCBlock(32, 4, global_local=True)), torch.randn(2, 32, 6, 7)
    last = block.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(last, block.to(memory_format=torch.contiguous_format)(x))


@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
@torch.no_grad()
def test_recursive_gated_conv__multiplies_as_many_times_as_its_order(order: int):
    """Without biases it is a homogeneous polynomial of degree order + 1 of its input."""
    conv = RecursiveGatedConv(32, order).double()
    for name, parameter in conv.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
    x = torch.randn(1, 32, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(conv(2 * x), 2 ** (order + 1) * conv(x))
    assert conv(x).abs().max() > 0


@torch.no_grad()
def test_recursive_gated_conv__one_depthwise_convolution_sees_its_kernel():
    expected = torch.zeros(15, 15, dtype=torch.bool)
    expected[4:11, 4:11] = True
    conv = RecursiveGatedConv(32, 3, kernel=7).double()
    assert torch.equal(reach(conv, torch.randn(1, 32, 15, 15, dtype=torch.float64)), expected)


@torch.no_grad()
def test_recursive_gated_conv__sees_everything_through_the_filter():
    conv = RecursiveGatedConv(32, 4, global_local=True)
    assert reach(conv, 3 * torch.randn(1, 32, 15, 13)).float().mean() > 0.95


@pytest.mark.parametrize(("order", "global_local"), [(5, False), (4, True)])
def test_recursive_gated_conv__refuses_channels_that_do_not_halve(order: int, global_local: bool):
    RecursiveGatedConv(24, order - 1, global_local=global_local)
    with pytest.raises(ConfigError, match=r"codec\.rgc_orders.*24 channels.*16"):
        RecursiveGatedConv(24, order, global_local=global_local)


@pytest.mark.parametrize(("height", "width"), SIZES)
@torch.no_grad()
def test_global_local_filter__constant_spectrum_is_the_identity_at_any_size(height: int, width: int):
    """Half of the channels, every second one of the result, pass a filter of ones as they are."""
    layer = GlobalLocalFilter(8)
    layer.norm_in = layer.norm_out = nn.Identity()
    layer.weight.copy_(torch.tensor([1.0, 0.0]).expand_as(layer.weight))
    x = torch.randn(2, 8, height, width)
    result = layer(x)
    torch.testing.assert_close(result[:, 1::2], x[:, 4:])
    torch.testing.assert_close(result[:, 0::2], layer.local(x[:, :4]))


@torch.no_grad()
def test_global_local_filter__is_a_circular_convolution_where_the_filter_was_learned():
    layer = GlobalLocalFilter(4)
    layer.norm_in = layer.norm_out = nn.Identity()
    x = torch.randn(1, 4, FILTER_SIZE[0], 2 * (FILTER_SIZE[1] - 1))
    moved = layer(x.roll((3, 5), dims=(2, 3)))[:, 1::2]
    torch.testing.assert_close(moved, layer(x)[:, 1::2].roll((3, 5), dims=(2, 3)))
    kernel = torch.fft.irfft2(torch.view_as_complex(layer.weight), s=x.shape[-2:])
    at_origin = sum(
        kernel[:, -row % 14, -column % 14] * x[:, 2:, row, column] for row in range(14) for column in range(14)
    )
    torch.testing.assert_close(layer(x)[:, 1::2, 0, 0], at_origin, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_global_local_filter__sees_the_whole_plane():
    assert reach(GlobalLocalFilter(8), torch.randn(1, 8, 20, 26)).float().mean() > 0.95


@pytest.mark.parametrize(("height", "width"), [(7, 5), (16, 16)])
@torch.no_grad()
def test_global_local_filter__runs_under_autocast(height: int, width: int):
    layer, x = GlobalLocalFilter(8), torch.randn(2, 8, height, width)
    exact = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(layer(x.bfloat16()).float(), exact, atol=0.1, rtol=0.05)
