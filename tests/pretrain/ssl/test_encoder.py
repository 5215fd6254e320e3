from __future__ import annotations

import pytest
import torch

from pretrain.codec.backbone import Backbone
from pretrain.codec.config import CodecConfig
from pretrain.codec.redundancy import RedundancyElimination
from pretrain.errors import CodecError
from pretrain.ssl.config import LAYERS
from pretrain.ssl.encoder import Encoder


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    torch.manual_seed(0)
    backbone = Backbone("resnet10t")
    config = CodecConfig(backbone="resnet10t", re_channels=8, re_latent=8, re_depths=[1, 1, 1], re_kernel=3)
    return Encoder(backbone, RedundancyElimination(backbone.channels, config)).eval()


@pytest.mark.parametrize("enabled", [False, True])
@torch.no_grad()
def test_forward__shapes_with_and_without_redundancy(encoder: Encoder, enabled: bool):
    encoder.redundancy_enabled = enabled
    images = torch.randn(2, 3, 64, 32)
    output = encoder(images)
    assert output.features.shape == (2, encoder.backbone.num_features)
    assert output.f1.shape == (2, encoder.backbone.channels, 16, 8)
    assert (output.f2 is not None) == (output.y1_likelihoods is not None) == enabled
    if output.f2 is not None:
        assert output.f2.shape == output.f1.shape


@pytest.mark.parametrize("enabled", [False, True])
@torch.no_grad()
def test_feature_map__is_what_forward_computes(encoder: Encoder, enabled: bool):
    encoder.redundancy_enabled = enabled
    images = torch.randn(2, 3, 32, 32)
    output = encoder(images)
    layer1 = output.f2 if enabled else output.f1
    assert layer1 is not None
    expected = dict(zip(LAYERS, (layer1, *encoder.backbone.tail(layer1)), strict=True))
    for name, features in expected.items():
        assert torch.equal(encoder.feature_map(images, name), features)
    assert torch.equal(encoder.backbone.pool(expected["layer4"]), output.features)


@torch.no_grad()
def test_feature_map__computes_nothing_after_its_layer(encoder: Encoder):
    called = []
    handle = encoder.backbone.layer4.register_forward_hook(lambda *_: called.append(True))
    encoder.feature_map(torch.randn(1, 3, 32, 32), "layer3")
    handle.remove()
    assert not called


def test_feature_map__unknown_layer_names_the_nearest(encoder: Encoder):
    with pytest.raises(CodecError, match=r"layr4.*layer4"):
        encoder.feature_map(torch.randn(1, 3, 32, 32), "layr4")
