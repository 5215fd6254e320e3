from __future__ import annotations

import pytest
import torch
from small_codecs import random_images
from torch import nn

from pretrain.codec.feature_codec import FeatureCodec
from pretrain.codec.tiles import in_strips, in_tiles
from pretrain.errors import CodecError


def test_tile__streams_and_features_are_those_of_the_whole_but_near_seams(codec: FeatureCodec):
    image = random_images(1, 256, 320)[0]
    whole, tiled = codec.encode(image), codec.encode(image, tile=128)
    assert codec.encode(image, tile=512) == whole
    assert abs(len(tiled) - len(whole)) < 0.05 * len(whole)
    f3, f3_tiled = codec.decode(whole), codec.decode(tiled, tile=128)
    assert f3.shape == f3_tiled.shape
    assert float((f3 - f3_tiled).square().mean()) < 0.1 * float(f3.var())
    with pytest.raises(CodecError, match="tile=100 must be a positive multiple of 64"):
        codec.encode(image, tile=100)


def test_in_tiles__a_network_that_sees_less_than_the_margin_gives_the_whole():
    torch.manual_seed(0)
    halve = torch.nn.Conv2d(2, 3, 5, stride=2, padding=2).requires_grad_(False)
    double = torch.nn.ConvTranspose2d(2, 3, 4, stride=2, padding=1).requires_grad_(False)
    inputs = torch.rand(1, 2, 40, 56)
    for network in (halve, double):
        assert torch.allclose(in_tiles(network, inputs, tile=16, margin=8), network(inputs), atol=1e-6)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@torch.no_grad()
def test_in_strips__gives_the_whole_to_the_last_rows(memory_format: torch.memory_format):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 1), nn.GELU(), nn.Conv2d(8, 4, 3, padding=1)).to(
        memory_format=memory_format
    )
    for height in (1, 30, 31, 97):
        inputs = torch.rand(2, 3, height, 100).contiguous(memory_format=memory_format)
        assert torch.allclose(in_strips(network, inputs, halo=1), network(inputs), atol=1e-6)


def test_in_strips__keeps_gradients():
    inputs = torch.rand(1, 2, 64, 100, requires_grad=True)
    in_strips(lambda rows: 3 * rows, inputs).sum().backward()
    assert torch.equal(inputs.grad, torch.full_like(inputs, 3))
