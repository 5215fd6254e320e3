"""The codec that a run starts from: fresh, with timm's weights in its backbone, or an exported one."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from pretrain.codec.feature_codec import FeatureCodec
from pretrain.codec.pretrained import kept
from pretrain.config import PretrainConfig
from pretrain.errors import CodecError

# Options of a codec that may differ from those of the one it starts from: what they add starts fresh.
ADDED = {"pretrained", "rate_points", "context", "context_depth", "base_channels", "guard"}
REDUNDANCY = {"redundancy", "re_channels", "re_latent", "re_depths", "re_kernel", "block"}


def create_codec(config: PretrainConfig) -> FeatureCodec:
    """A trainable codec of `config.codec`; with `config.init` its `init_parts` have the weights of that exported codec.

    Raises:
        CodecError: `init` is not a codec folder, or one whose parts have other options.
    """
    codec = FeatureCodec(config.codec)
    if config.init is None:
        return codec
    start = FeatureCodec.from_pretrained(kept(config.init, Path(config.run)))
    wanted, found = vars(config.codec), vars(start.config)
    for key in wanted.keys() - ADDED:
        if wanted[key] != found[key] and _part(key) in config.init_parts:
            raise CodecError(
                f"init={config.init} has codec.{key}={found[key]}, the recipe has {wanted[key]}; "
                f"set codec.{key} to its value, or leave {_part(key)} out of init_parts, which then starts fresh"
            )
    shapes = {name: tensor.shape for name, tensor in codec.state_dict().items()}
    weights = {
        name: tensor
        for name, tensor in start.state_dict().items()
        if tensor.shape == shapes.get(name) and _part(name.partition(".")[0]) in config.init_parts
    }
    codec.load_state_dict(weights, strict=False)
    return codec


def begins_compression(config: PretrainConfig, index: int) -> bool:
    """Whether stage `index` is to begin with a KLT: the first one to train a compression network that starts fresh."""
    trains = ["compression" in stage.trains for stage in config.stages[: index + 1]]
    given = config.init is not None and "compression" in config.init_parts
    return config.stages[index].klt and trains[index] and not any(trains[:index]) and not given


def _part(name: str) -> str:
    """The part of the codec that an option, or a child module, belongs to."""
    if name == "backbone":
        return "backbone"
    return "redundancy" if name == "redundancy" or name in REDUNDANCY else "compression"


def checkpoint_activations(codec: FeatureCodec) -> None:
    """Recompute the backbone's residual stages and the transforms in the backward pass (Chen et al. 2016).

    Uses fairscale's checkpoint_wrapper, which patches the modules in place: names in the state dict stay.
    """
    from fairscale.nn.checkpoint import checkpoint_wrapper

    backbone = codec.backbone
    modules: list[nn.Module] = [backbone.layer1, backbone.layer2, backbone.layer3, backbone.layer4]
    for module in [*modules, codec.g_a, codec.g_s]:
        checkpoint_wrapper(module)
