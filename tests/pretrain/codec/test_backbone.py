from __future__ import annotations

from pathlib import Path

import huggingface_hub.constants
import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from pretrain.codec.backbone import Backbone, multiple_of, pad_to
from pretrain.errors import CodecError, ConfigError

# What differs between them: basic and bottleneck blocks, deep stems, pooling, groups, width, attention.
RESNETS = [
    "resnet10t", "resnet18", "resnet18d", "resnet34", "resnet50", "resnet50d", "resnet101", "resnet152",
    "resnet50_gn", "resnext50_32x4d", "wide_resnet50_2", "seresnet50", "ecaresnet50t", "resnetrs50", "resnetblur50",
    "resnetaa50",
]  # fmt: skip


@pytest.mark.parametrize("name", RESNETS)
def test_backbone__splits_any_timm_resnet_at_stride_four(name: str):
    with torch.device("meta"):  # shapes alone
        backbone = Backbone(name)
        f1 = backbone.head(torch.empty(2, 3, 64, 96))
        levels = backbone.tail(f1)
        pooled = backbone.pool(levels[-1])
    assert f1.shape == (2, backbone.channels, 16, 24)
    assert [level.shape[1:] for level in levels] == [
        (channels, 64 // stride, 96 // stride)
        for channels, stride in zip(backbone.tail_channels, (8, 16, 32), strict=True)
    ]
    assert pooled.shape == (2, backbone.num_features)


@pytest.mark.parametrize("name", ["resnet18", "resnet50d", "resnetrs50"])
@torch.no_grad()
def test_backbone__computes_what_timm_computes(name: str):
    torch.manual_seed(0)
    whole = timm.create_model(name, num_classes=0).eval()
    torch.manual_seed(0)
    split = Backbone(name).eval()
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(split(images), whole(images))


@pytest.mark.parametrize("name", ["resnet49", "vgg16"])
def test_backbone__refuses_what_is_not_a_resnet(name: str):
    with pytest.raises(ConfigError, match=f"codec.backbone={name}"):
        Backbone(name)


@pytest.mark.parametrize("name", ["resnet50_clip"])
def test_backbone__refuses_a_resnet_of_another_module(name: str):
    with pytest.raises(ConfigError, match="did you mean resnet50"):
        Backbone(name)


def test_backbone__weights_that_cannot_be_fetched_name_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(CodecError, match=r"weights of resnet18 could not be fetched .*codec\.pretrained=false"):
        Backbone("resnet18", pretrained=True)


def test_backbone__resnet50_costs_what_is_said_of_it():
    """Multiply-adds at 224 x 224: 0.8 G in the head, 3.3 G in the tail."""
    with torch.device("meta"):
        backbone, images = Backbone("resnet50"), torch.empty(1, 3, 224, 224)
        with FlopCounterMode(display=False) as head:
            f1 = backbone.head(images)
        with FlopCounterMode(display=False) as tail:
            backbone.tail(f1)
    assert head.get_total_flops() / 2e9 == pytest.approx(0.8, rel=0.05)
    assert tail.get_total_flops() / 2e9 == pytest.approx(3.3, rel=0.05)


@pytest.mark.parametrize("height", [1, 16, 33, 63, 64, 65, 200])
@pytest.mark.parametrize("width", [1, 17, 64, 130])
def test_pad_to__extends_to_a_multiple_and_keeps_the_image(height: int, width: int):
    images = torch.rand(2, 3, height, width)
    padded = pad_to(images, 64)
    assert padded.shape == (2, 3, multiple_of(height, 64), multiple_of(width, 64))
    assert torch.equal(padded[..., :height, :width], images)
    # Nothing but the image's own values: no zeros, no ringing.
    assert torch.isin(padded, images).all()


def test_pad_to__reflects_where_the_image_is_large_enough():
    images = torch.rand(1, 1, 40, 50)
    expected = torch.nn.functional.pad(images, (0, 14, 0, 24), mode="reflect")
    assert torch.equal(pad_to(images, 64), expected)
