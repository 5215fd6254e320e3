from __future__ import annotations

from typing import Any

import pytest
from omegaconf import OmegaConf

from pretrain.codec.config import CodecConfig, validate_backbone
from pretrain.errors import ConfigError

SMALL: dict[str, Any] = {
    "backbone": "resnet18", "re_channels": 48, "re_latent": 64, "transform_channels": 64, "latent_channels": 96,
    "hyper_dim": 96, "hyper_heads": 3, "hyper_head_dim": 32, "z_channels": 64,
}  # fmt: skip


@pytest.mark.parametrize("values", [{}, SMALL, {"block": "convformer"}, {"base_channels": 1}, {"base_channels": 191}])
def test_validate__takes_the_authors_sizes_and_small_ones(values: dict[str, Any]):
    CodecConfig(**values).validate()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"block": "conv2formr"}, ["codec.block=conv2formr", "conv2former"]),
        ({"backbone": "resnet51"}, ["codec.backbone=resnet51", "resnet50"]),
        ({"latent_channels": 0}, ["codec.latent_channels=0", "at least 1"]),
        ({"hyper_dim": 10**9}, ["codec.hyper_dim=1000000000", "at most 65536"]),
        ({"context_depth": 10**6}, ["codec.context_depth=1000000", "at most 256"]),
        ({"rgc_orders": [2, 3, 10**9]}, ["codec.rgc_orders=[2, 3, 1000000000]", "0..8"]),
        ({"window": -1}, ["codec.window=-1", "at least 1"]),
        ({"re_depths": [1, 1]}, ["codec.re_depths=[1, 1]", "three"]),
        ({"rgc_orders": [2, -1, 4]}, ["codec.rgc_orders=[2, -1, 4]", "0 for none"]),
        ({"re_kernel": 10}, ["codec.re_kernel=10", "odd"]),
        ({"rgc_kernel": 4}, ["codec.rgc_kernel=4", "odd"]),
        ({"base_channels": 192}, ["codec.base_channels=192", "0..191"]),
        ({"base_channels": -1}, ["codec.base_channels=-1", "0..191"]),
        ({"transform_channels": 100}, ["codec.transform_channels=100", "multiple of 16"]),
        ({"latent_channels": 24}, ["codec.latent_channels=24", "multiple of 16"]),
    ],
)
def test_validate__names_key_value_and_what_is_right_in_one_line(values: dict[str, Any], words: list[str]):
    with pytest.raises(ConfigError) as caught:
        CodecConfig(**values).validate()
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("name", ["resnet10t", "resnet152", "resnext50_32x4d", "wide_resnet50_2", "seresnet50"])
def test_validate_backbone__takes_any_timm_resnet(name: str):
    validate_backbone(name)


@pytest.mark.parametrize("name", ["vit_base_patch16_224", "", "../resnet50", "convnext_tiny"])
def test_validate_backbone__refuses_other_networks(name: str):
    with pytest.raises(ConfigError, match="not a timm ResNet; did you mean"):
        validate_backbone(name)


def test_config__survives_yaml():
    config = CodecConfig(**SMALL, rgc_orders=[1, 2, 3])
    text = OmegaConf.to_yaml(OmegaConf.structured(config))
    merged = OmegaConf.merge(OmegaConf.structured(CodecConfig), OmegaConf.create(text))
    assert OmegaConf.to_object(merged) == config
