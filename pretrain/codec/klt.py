"""Where training of the transforms starts: the Karhunen-Loeve transform of the features that they code.

      f2 -> 2x2 places of C1 channels -> their first principal components      first 5x5 /2 of g_a, last of g_s
         -> 2x2 places of these       -> their first principal components, y2  last 5x5 /2 of g_a, first of g_s

From random weights a signal fades on its way through g_a and g_s, nothing is left of it after rounding, and most of a
short training goes by until it is. The Karhunen-Loeve transform is the best linear one for a squared error at high
rates, in two steps of two by two places nearly that of four by four. Everything else in the transforms starts as
(nearly) the identity: layer scales of gated convolutions at 1e-6, slopes of activations at one. Priors of y2 start with
the components' deviations.

Sources: the transform, Goyal, "Theoretical foundations of transform coding", IEEE Signal Processing Magazine 2001.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from pretrain.codec.feature_codec import LATENT_STRIDE, FeatureCodec

# Of the first component of y2, in steps of the quantizer: between the rates that a codec of features is used at.
STEPS = 4.0
# Of 2x2 places in a kernel of 5x5 that moves by two: the rows and columns that it does not share with its neighbours.
PLACES = slice(2, 4)
ENOUGH = 2**13  # places of y2 that components are estimated from


def num_images(image_size: int) -> int:
    """How many images of a size give enough places."""
    return -(-ENOUGH // (image_size // LATENT_STRIDE) ** 2)


@torch.no_grad()
def begin_as_klt(codec: FeatureCodec, f2: Iterable[Tensor]) -> None:
    """Set g_a, g_s and the bias of h_s's head, in place.

    Args:
        f2: batches (N, C1, h, w) of the features that will be coded, h and w multiples of 4. They are kept.
    """
    features = torch.cat([each.float() for each in f2])
    down, widen, out = codec.g_a.convolutions
    up, narrow, last = codec.g_s.convolutions
    first = Components.of(_blocks(features), down.out_channels)
    passed = min(widen.in_channels, widen.out_channels)
    second = Components.of(_blocks(first.project(features)[:, :passed]), out.out_channels)
    greatest = second.deviations[0]
    step = torch.where(greatest > 0, greatest, 1.0) / STEPS

    _analyse(down, first, 1.0)
    _synthesize(last, first, 1.0)
    for module in (widen, narrow):
        _pass_on(module, passed)
    _analyse(out, second, 1 / step)
    _synthesize(up, second, step)

    head = codec.h_s.head
    head.weight.mul_(0.1)  # what z says is noise so far
    assert head.bias is not None
    means, scales = head.bias.chunk(2)
    means.zero_()
    scales.fill_(float(codec.entropy.y2.lower_bound_scale.bound))
    scales[: len(second.deviations)].clamp_(min=second.deviations / step)


class Components:
    """Principal components of the 2x2 blocks of maps.

    Attributes:
        vectors: (K, C, 2, 2), orthonormal, the first one of the greatest variance.
        mean: (C, 2, 2) of a block.
        deviations: (K,) of the components.
    """

    def __init__(self, vectors: Tensor, mean: Tensor, deviations: Tensor):
        self.vectors, self.mean, self.deviations = vectors, mean, deviations

    @classmethod
    def of(cls, blocks: Tensor, count: int) -> Components:
        """Of blocks (M, C, 2, 2), as many as there are up to `count`."""
        rows, shape = blocks.flatten(1).double(), blocks.shape[1:]
        values, vectors = torch.linalg.eigh(torch.cov(rows.T, correction=0))  # rising
        chosen, deviations = vectors.flip(1)[:, :count].T, values.flip(0)[:count].clamp(min=0).sqrt()
        return cls(chosen.reshape(-1, *shape).float(), rows.mean(0).reshape(shape).float(), deviations.float())

    def project(self, maps: Tensor) -> Tensor:
        """Components (N, K, h/2, w/2) of maps (N, C, h, w)."""
        offset = -torch.einsum("kcab,cab->k", self.vectors, self.mean)
        return nn.functional.conv2d(maps, self.vectors, offset, stride=2)


def _blocks(maps: Tensor) -> Tensor:
    """Maps (N, C, h, w) cut into blocks (N * h/2 * w/2, C, 2, 2)."""
    return nn.functional.pixel_unshuffle(maps, 2).movedim(1, -1).reshape(-1, maps.shape[1], 2, 2)


def _analyse(module: nn.Conv2d, components: Components, scale: Tensor | float) -> None:
    """Make a convolution give components, of the first channels that it reads; the others are not looked at yet."""
    count, channels = components.vectors.shape[:2]
    assert module.bias is not None
    module.weight[:count].zero_()
    module.weight[:count, :channels, PLACES, PLACES] = components.vectors * scale
    module.weight[:, channels:].zero_()
    module.bias[:count] = -torch.einsum("kcab,cab->k", components.vectors, components.mean) * scale


def _synthesize(module: nn.ConvTranspose2d, components: Components, scale: Tensor | float) -> None:
    """Make a transposed convolution of components give the blocks; channels beyond these stay as they are."""
    count, channels = components.vectors.shape[:2]
    assert module.bias is not None
    module.weight[:, :channels].zero_()
    module.weight[:count, :channels, PLACES, PLACES] = components.vectors * scale
    module.bias[:channels] = components.mean.mean((1, 2))


def _pass_on(module: nn.Conv2d, count: int) -> None:
    """Make a 3x3 convolution hand its first channels on; what it adds to them comes later."""
    assert module.bias is not None
    module.weight[:count].zero_()
    module.weight[:count, :count, 1, 1] = torch.eye(count, device=module.weight.device)
    module.bias[:count].zero_()
