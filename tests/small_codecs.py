"""Codecs with narrow networks and random weights, and images for them."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from data_pipeline.views import normalize
from pretrain.codec.config import CodecConfig
from pretrain.codec.feature_codec import FeatureCodec

Network = TypeVar("Network", bound=nn.Module)

NARROW = CodecConfig(
    backbone="resnet18", re_channels=16, re_latent=16, re_depths=[1, 1, 1], transform_channels=16,
    latent_channels=32, hyper_dim=24, hyper_heads=2, hyper_head_dim=12, z_channels=8, base_channels=16,
)  # fmt: skip


def wake(network: Network) -> Network:
    """Random weights in place of the zeros that residual branches begin with, as after training; returns `network`."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and not module.weight.any():
            module.reset_parameters()
    return network


def create_codec(seed: int = 0, backbone: str = NARROW.backbone) -> FeatureCodec:
    """Random weights whose latents fill many symbols; means and scales fit them, as after training."""
    torch.manual_seed(seed)
    codec = wake(FeatureCodec(replace(NARROW, backbone=backbone)).eval())
    images = normalize(random_images(8, 64, 64).float() / 255)
    with torch.no_grad():
        y2, _ = codec.analyse(images)
        codec.g_a[-1].weight.mul_(2.5 / y2.std())
        y2, z = codec.analyse(images)
        codec.h_a[-1].weight.mul_(2.5 / z.std())
        spread = y2.std(dim=(0, 2, 3))
        codec.h_s.head.weight.mul_(0.1)
        codec.h_s.head.bias.copy_(torch.cat([y2.mean(dim=(0, 2, 3)), spread]))
    return codec


def random_images(count: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Smooth coloured noise, uint8."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, height // 8 + 2, width // 8 + 2, generator=generator)
    fine = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic")
    return (fine + 0.05 * torch.randn(fine.shape, generator=generator)).clamp(0, 1).mul(255).byte()


def with_options(codec: FeatureCodec, **options: object) -> FeatureCodec:
    """The weights of `codec` in one of other options; what these add is random."""
    torch.manual_seed(1)
    changed = wake(FeatureCodec(replace(NARROW, **options)).eval().requires_grad_(False))
    changed.load_state_dict(codec.state_dict(), strict=False)
    for name in ("z_gain", "y2_gain"):
        if (gain := getattr(changed, name)) is not None:
            gain.log_gain.add_(0.1 * torch.randn_like(gain.log_gain))
    if changed.context is not None:
        torch.nn.init.normal_(changed.context.head.weight, std=0.02)
    return changed
