"""Sizes of the codec's network; the defaults are the authors' values (DICM, Tang, Yi, Wang 2025)."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from reprlib import repr as shown

from pretrain.errors import ConfigError

BLOCKS = ("conv2former", "convformer")
HYPERPRIORS = ("vit", "conv")
CONTEXTS = ("none", "checkerboard", "space_channel")
PRECISIONS = ("fp32", "bf16")
# Sizes come with codecs of others, too: beyond these, building the network would not end.
LARGEST_SIZE = 2**16
MOST_BLOCKS = 256
HIGHEST_ORDER = 8


@dataclass
class CodecConfig:
    """Everything that decides the shapes of the codec's weights and the meaning of its streams."""

    backbone: str = "resnet50"  # any timm ResNet with stem and layer1..layer4
    pretrained: bool = False  # timm's weights in the backbone to start from

    redundancy: bool = True  # RE between backbone and compression network; without it f2 is f1
    re_channels: int = 128  # RE: width of its three stages
    re_latent: int = 192  # channels of y1, at H/32
    re_depths: list[int] = field(default_factory=lambda: [1, 1, 2])  # blocks in each stage; 0: none there
    re_kernel: int = 11  # depthwise kernel of a Conv2Former block
    block: str = "conv2former"

    transform_channels: int = 128  # g_a, g_s: width at H/8
    latent_channels: int = 192  # channels of y2, at H/16
    rgc_orders: list[int] = field(default_factory=lambda: [2, 3, 4])  # at H/4, H/8, H/8; 0: no block there
    rgc_kernel: int = 7  # depthwise kernel of a recursive gated convolution

    hyperprior: str = "vit"  # h_a, h_s: ViT blocks; or conv, 3x3 convolutions in their place
    hyper_dim: int = 384  # h_a, h_s: width of the tokens
    hyper_heads: int = 6
    hyper_head_dim: int = 64
    z_channels: int = 192  # channels of z, at H/64
    window: int = 16  # attention is global up to window x window tokens, windowed above

    context: str = "none"  # y2 in steps, each predicted from those before it: checkerboard (2) or space_channel (6)
    context_depth: int = 6  # ViT blocks of the context model

    rate_points: int = 1  # rates that are trained, with gains around the quantization; 1: a codec of one rate
    base_channels: int = 0  # channels of y2 in the stream's `base` layer; 0: all, no `rest` layer
    guard: float = (
        1e-7  # the reader's scales of y2 may be off by this part of themselves; the stream lists closer calls
    )

    def validate(self) -> None:
        """Refuse impossible values (ConfigError)."""
        if self.block not in BLOCKS:
            raise ConfigError(f"codec.block={self.block} is unknown; use {_nearest(self.block, BLOCKS)}")
        if self.hyperprior not in HYPERPRIORS:
            valid = _nearest(self.hyperprior, HYPERPRIORS)
            raise ConfigError(f"codec.hyperprior={self.hyperprior} is unknown; use {valid}")
        if self.context not in CONTEXTS:
            raise ConfigError(f"codec.context={self.context} is unknown; use {_nearest(self.context, CONTEXTS)}")
        if self.context != "none" and self.base_channels:
            raise ConfigError(
                f"codec.base_channels={self.base_channels} with codec.context={self.context}: a context model "
                "reads all channels, so its streams have one layer; set base_channels=0 or context=none"
            )
        if not 0 <= self.guard <= 1e-2:
            raise ConfigError(f"codec.guard={self.guard:g} must lie in 0..0.01, a small part of a scale")
        validate_backbone(self.backbone)
        for key, value in vars(self).items():
            if isinstance(value, int) and not isinstance(value, bool) and key != "base_channels":
                largest = MOST_BLOCKS if key in ("context_depth", "rate_points") else LARGEST_SIZE
                if value < 1:
                    raise ConfigError(f"codec.{key}={value} is impossible; it must be at least 1")
                if value > largest:
                    raise ConfigError(f"codec.{key}={value} is impossible; it must be at most {largest}")
        for key, largest in (("re_depths", MOST_BLOCKS), ("rgc_orders", HIGHEST_ORDER)):
            value = getattr(self, key)
            if len(value) != 3 or min(value) < 0 or max(value) > largest:
                raise ConfigError(f"codec.{key}={shown(value)} needs three numbers in 0..{largest}, 0 for none")
        for key in ("re_kernel", "rgc_kernel"):
            if getattr(self, key) % 2 == 0:
                raise ConfigError(f"codec.{key}={getattr(self, key)} must be odd")
        if not 0 <= self.base_channels < self.latent_channels:
            raise ConfigError(
                f"codec.base_channels={self.base_channels} must lie in 0..{self.latent_channels - 1} "
                "(latent_channels - 1); 0 puts all channels into one layer"
            )
        divisor = 2 ** max(max(self.rgc_orders) - 1, 0)
        for key in ("transform_channels", "latent_channels"):
            if getattr(self, key) % (2 * divisor):
                raise ConfigError(
                    f"codec.{key}={getattr(self, key)} must be a multiple of {2 * divisor} for gated "
                    f"convolutions of order {max(self.rgc_orders)}"
                )


def validate_backbone(name: str) -> None:
    """Refuse what is not a ResNet of timm's (ConfigError with near names)."""
    import timm

    resnets = timm.list_models(module="resnet")
    if name not in resnets:
        raise ConfigError(f"codec.backbone={name} is not a timm ResNet; did you mean {_nearest(name, resnets)}?")


def _nearest(value: str, valid: list[str] | tuple[str, ...]) -> str:
    return " or ".join(difflib.get_close_matches(value, valid, n=3, cutoff=0.5) or list(valid)[:5])
