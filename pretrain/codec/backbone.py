"""The ResNet that the codec is split into: head (stem + layer1, stride 4) and tail (layer2, layer3, layer4).

Comes from timm, any ResNet of it. f1 = head(images) is what the codec compresses; the tail reads f3, what is left
of f1 after the codec, as if it were f1.
"""

from __future__ import annotations

import timm
import torch
from torch import Tensor, nn

from pretrain.codec.config import validate_backbone
from pretrain.codec.small_planes import use_products
from pretrain.errors import CodecError

HEAD_STRIDE = 4


class Backbone(nn.Module):
    """A timm ResNet, split.

    Attributes:
        channels: C1, channels of f1.
        tail_channels: channels of layer2, layer3, layer4; `num_features` is the last.

    Raises:
        ConfigError: `name` is not a ResNet of timm's.
        CodecError: it does not have stride 4 after layer1, or its weights could not be fetched.
    """

    def __init__(self, name: str, pretrained: bool = False):
        super().__init__()
        validate_backbone(name)
        try:
            resnet = timm.create_model(name, pretrained=pretrained, num_classes=0)
        except Exception as error:
            if not pretrained:
                raise
            raise CodecError(
                f"weights of {name} could not be fetched ({type(error).__name__}); "
                "set codec.pretrained=false or connect"
            ) from error
        self.stem = nn.Sequential(resnet.conv1, resnet.bn1, resnet.act1, resnet.maxpool)
        self.layer1, self.layer2 = resnet.layer1, resnet.layer2
        self.layer3, self.layer4 = resnet.layer3, resnet.layer4
        use_products(self.layer4)
        levels = resnet.feature_info[-4:]
        channels, strides = [level["num_chs"] for level in levels], [level["reduction"] for level in levels]
        if strides != [4, 8, 16, 32]:
            raise CodecError(f"{name} has strides {strides} after its layers, the codec needs 4, 8, 16, 32")
        self.channels: int = channels[0]
        self.tail_channels: tuple[int, int, int] = (channels[1], channels[2], channels[3])
        self.num_features: int = channels[3]

    def head(self, images: Tensor) -> Tensor:
        """f1 (N, C1, H/4, W/4) of normalised images (N, 3, H, W)."""
        return self.layer1(self.stem(images))

    def tail(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """layer2 (H/8), layer3 (H/16) and layer4 (H/32) of f1, f2 or f3 (N, C1, H/4, W/4)."""
        layer2 = self.layer2(features)
        layer3 = self.layer3(layer2)
        return layer2, layer3, self.layer4(layer3)

    def pool(self, layer4: Tensor) -> Tensor:
        """(N, num_features): mean over places."""
        return layer4.mean(dim=(2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """Pooled features (N, num_features) of normalised images, without the codec."""
        return self.pool(self.tail(self.head(images))[-1])


def multiple_of(value: int, step: int) -> int:
    """`value` rounded up to a multiple of `step`."""
    return -(-value // step) * step


def crop_to(maps: Tensor, height: int, width: int, stride: int) -> Tensor:
    """The places of (..., h, w), one every `stride` pixels, that see an image of height x width pixels; a view."""
    return maps[..., : -(-height // stride), : -(-width // stride)]


def pad_to(images: Tensor, step: int) -> Tensor:
    """Pad (N, C, H, W) at the right and the bottom to multiples of `step`: reflect, replicate where too small."""
    height, width = images.shape[-2:]
    right, bottom = multiple_of(width, step) - width, multiple_of(height, step) - height
    if not (right or bottom):
        return images
    while right or bottom:
        # Reflection reaches one pixel less than the image is wide; small images need it more than once.
        now_right = min(right, images.shape[-1] - 1)
        now_bottom = min(bottom, images.shape[-2] - 1)
        mode = "reflect" if now_right >= min(right, 1) and now_bottom >= min(bottom, 1) else "replicate"
        if mode == "replicate":
            now_right, now_bottom = right, bottom
        images = torch.nn.functional.pad(images, (0, now_right, 0, now_bottom), mode=mode)
        right, bottom = right - now_right, bottom - now_bottom
    return images
