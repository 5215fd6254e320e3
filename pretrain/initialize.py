"""The codec that a run starts from: fresh, with timm's weights in its backbone, or an exported one."""

from __future__ import annotations

from torch import nn

from pretrain.codec.feature_codec import FeatureCodec
from pretrain.config import PretrainConfig
from pretrain.errors import CodecError


def create_codec(config: PretrainConfig) -> FeatureCodec:
    """A trainable codec of `config.codec`; with `config.init` its weights are those of that exported codec.

    Raises:
        CodecError: `init` is not a codec folder, or one of another configuration.
    """
    if config.init is None:
        return FeatureCodec(config.codec)
    codec = FeatureCodec.from_pretrained(config.init)
    different = [key for key, value in vars(config.codec).items() if getattr(codec.config, key) != value]
    if different:
        key = different[0]
        raise CodecError(
            f"init={config.init} has codec.{key}={getattr(codec.config, key)}, "
            f"the recipe has {getattr(config.codec, key)}; "
            f"start from a codec of the same configuration or set codec.{key} to its value"
        )
    return codec.requires_grad_(True)


def checkpoint_activations(codec: FeatureCodec) -> None:
    """Recompute the backbone's residual stages and the transforms in the backward pass (Chen et al. 2016).

    Uses fairscale's checkpoint_wrapper, which patches the modules in place: names in the state dict stay.
    """
    from fairscale.nn.checkpoint import checkpoint_wrapper

    backbone = codec.backbone
    modules: list[nn.Module] = [backbone.layer1, backbone.layer2, backbone.layer3, backbone.layer4]
    for module in [*modules, codec.g_a, codec.g_s]:
        checkpoint_wrapper(module)
