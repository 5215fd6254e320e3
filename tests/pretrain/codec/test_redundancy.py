from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import l1_loss
from torch.utils.flop_counter import FlopCounterMode

from pretrain.codec.config import CodecConfig
from pretrain.codec.redundancy import RedundancyElimination, create_block

BLOCKS = ["conv2former", "convformer"]


def create_redundancy(block: str = "conv2former", seed: int = 0) -> RedundancyElimination:
    torch.manual_seed(seed)
    config = CodecConfig(re_channels=16, re_latent=24, re_depths=[1, 1, 2], re_kernel=5, block=block)
    return RedundancyElimination(32, config)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize(("height", "width"), [(16, 16), (16, 48), (80, 32)])
@torch.no_grad()
def test_forward__keeps_the_shape_through_a_latent_at_an_eighth(block: str, height: int, width: int):
    redundancy = create_redundancy(block).eval()
    f1 = torch.randn(2, 32, height, width)
    assert redundancy.encode(f1).shape == (2, 24, height // 8, width // 8)
    f2, likelihoods = redundancy(f1)
    assert f2.shape == f1.shape
    assert likelihoods.shape == (2, 24, height // 8, width // 8)
    assert likelihoods.min() > 0 and likelihoods.max() <= 1


@pytest.mark.parametrize("block", BLOCKS)
def test_forward__reaches_every_weight_with_a_gradient(block: str):
    redundancy = create_redundancy(block)
    f1 = torch.randn(2, 32, 16, 16, requires_grad=True)
    f2, likelihoods = redundancy(f1)
    (l1_loss(f1, f2) - likelihoods.log().mean()).backward()
    for name, parameter in redundancy.named_parameters():
        if name != "entropy_bottleneck.quantiles":  # solved, not trained
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().sum() > 0, name


@torch.no_grad()
def test_forward__noise_in_training_and_rounding_in_eval():
    redundancy, f1 = create_redundancy(), torch.randn(2, 32, 16, 16)
    assert not torch.equal(redundancy(f1)[0], redundancy(f1)[0])
    redundancy.eval()
    assert torch.equal(redundancy(f1)[0], redundancy(f1)[0])
    medians = redundancy.entropy_bottleneck.quantiles[:, :, 1].view(1, -1, 1, 1)
    rounded = (redundancy.encode(f1) - medians).round() + medians
    torch.testing.assert_close(redundancy(f1)[0], redundancy.decode(rounded))


@torch.no_grad()
def test_forward__nothing_passes_beside_the_quantized_latent():
    redundancy = create_redundancy().eval()
    last = redundancy.encoder[-1]
    last.weight.zero_()  # y1 is its bias, whatever f1 is
    assert torch.equal(redundancy(torch.randn(1, 32, 16, 16))[0], redundancy(torch.randn(1, 32, 16, 16))[0])


@torch.no_grad()
def test_forward__same_seed_same_result():
    f1 = torch.randn(2, 32, 16, 16)
    first, second, other = (create_redundancy(seed=seed).eval()(f1)[0] for seed in (0, 0, 1))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_forward__learns_from_the_first_steps(block: str, precision: torch.dtype):
    redundancy = create_redundancy(block).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(redundancy.parameters(), lr=1e-3)
    f1 = torch.randn(2, 32, 1, 1).expand(2, 32, 8, 8).relu().contiguous(memory_format=torch.channels_last)
    losses = []
    for _ in range(30):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision is torch.bfloat16):
            f2, _ = redundancy(f1)
        loss = l1_loss(f2.float(), f1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    assert max(losses) < 1.5 * losses[0]


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 7), (16, 16)])
@torch.no_grad()
def test_create_block__keeps_any_shape(block: str, height: int, width: int):
    config = CodecConfig(block=block)
    x = torch.randn(2, 8, height, width)
    assert create_block(config, 8)(x).shape == x.shape


@torch.no_grad()
def test_create_block__conv2former_begins_as_the_identity():
    x = torch.randn(2, 8, 9, 9)
    torch.testing.assert_close(create_block(CodecConfig(), 8)(x), x, atol=1e-4, rtol=0)


@torch.no_grad()
def test_create_block__conv2former_sees_as_far_as_its_kernel():
    block = create_block(CodecConfig(re_kernel=11), 8)
    for name, parameter in block.named_parameters():
        if name.startswith("gamma"):
            parameter.fill_(1)
    block.position = nn.Identity()  # the MLP's own 3x3
    x = torch.randn(1, 8, 21, 21, dtype=torch.float64)
    changed = x.clone()
    changed[..., 10, 10] += torch.randn(8)
    block.double()
    moved = (block(changed) - block(x)).abs().amax(dim=(0, 1)) > 1e-9
    expected = torch.zeros(21, 21, dtype=torch.bool)
    expected[5:16, 5:16] = True
    assert torch.equal(moved, expected)


def test_forward__costs_what_is_said_of_it():
    """2.2 G multiply-adds at 224 x 224 with the authors' widths."""
    with torch.device("meta"), FlopCounterMode(display=False) as count:
        redundancy = RedundancyElimination(256, CodecConfig())
        redundancy.decode(redundancy.encode(torch.empty(1, 256, 56, 56)))
    assert count.get_total_flops() / 2e9 == pytest.approx(2.2, rel=0.15)
