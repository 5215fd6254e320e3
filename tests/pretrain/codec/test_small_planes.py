from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from pretrain.codec import small_planes
from pretrain.codec.backbone import Backbone
from pretrain.codec.small_planes import SmallPlaneConv2d, use_products


def convolutions(stride: int, bias: bool) -> tuple[nn.Conv2d, SmallPlaneConv2d]:
    """One with the product and one without, of the same weights."""
    torch.manual_seed(0)
    plain = nn.Conv2d(6, 512, 3, stride=stride, padding=1, bias=bias)
    other = SmallPlaneConv2d(6, 512, 3, stride=stride, padding=1, bias=bias)
    other.load_state_dict(plain.state_dict())
    return plain, other


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(1, 1), (2, 2), (3, 5), (4, 4), (7, 1)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_product__is_the_convolution_and_so_are_its_gradients(
    size: tuple[int, int], stride: int, memory_format: torch.memory_format
):
    results = []
    images = torch.randn(3, 6, *size).contiguous(memory_format=memory_format)
    for module in convolutions(stride, bias=True):
        given = images.clone().requires_grad_(True)
        output = module._product(given) if isinstance(module, SmallPlaneConv2d) else module(given)
        output.square().sum().backward()
        assert module.weight.grad is not None and module.bias is not None
        results.append((output, given.grad, module.weight.grad, module.bias.grad))
    for one, other in zip(*results, strict=True):
        assert one.shape == other.shape
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-3)


def test_forward__takes_the_product_for_small_float32_planes_alone(monkeypatch: pytest.MonkeyPatch):
    taken: list[tuple[int, ...]] = []
    product = SmallPlaneConv2d._product
    monkeypatch.setattr(SmallPlaneConv2d, "_product", lambda self, x: taken.append(tuple(x.shape)) or product(self, x))
    _, module = convolutions(1, bias=False)
    module(torch.randn(2, 6, 4, 4))
    module(torch.randn(2, 6, 4, 5))  # more places than it was faster for
    with torch.autocast("cpu", torch.bfloat16):
        module(torch.randn(2, 6, 2, 2))
    module.double()(torch.randn(2, 6, 2, 2).double())
    assert taken == [(2, 6, 4, 4)]
    assert module.to("meta")(torch.empty(2, 6, 2, 2, device="meta")).shape == (2, 512, 2, 2)


def test_use_products__of_a_backbone_keeps_its_weights_names_and_results():
    torch.manual_seed(0)
    backbone, plain = Backbone("resnet18").eval(), timm.create_model("resnet18", num_classes=0)
    chosen = [module for module in backbone.modules() if isinstance(module, SmallPlaneConv2d)]
    assert len(chosen) == 4 and all(module.out_channels >= small_planes.FEWEST_CHANNELS for module in chosen)
    layers = {name: value for name, value in backbone.state_dict().items() if name.startswith("layer")}
    plain.load_state_dict(layers, strict=False)
    with torch.no_grad():
        features = backbone.head(torch.randn(2, 3, 64, 64))
        wanted = plain.eval().layer4(plain.layer3(plain.layer2(features)))
        assert torch.allclose(backbone.tail(features)[-1], wanted, rtol=1e-3, atol=1e-4)


def test_use_products__leaves_other_convolutions_alone():
    kept = nn.Sequential(
        nn.Conv2d(8, 512, 1), nn.Conv2d(8, 512, 3), nn.Conv2d(8, 512, 3, padding=2, dilation=2),
        nn.Conv2d(8, 512, 3, padding=1, groups=8), nn.Conv2d(8, 256, 3, padding=1),
    )  # fmt: skip
    use_products(kept)
    assert not any(isinstance(module, SmallPlaneConv2d) for module in kept)
