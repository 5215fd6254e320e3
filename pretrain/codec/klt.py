"""Where training of the compression network starts: the Karhunen-Loeve transform of the features that it codes.

      f2 -> 2x2 places of C1 channels -> their first principal components      first 5x5 /2 of g_a, last of g_s
         -> 2x2 places of these       -> their first principal components, y2  last 5x5 /2 of g_a, first of g_s
         -> 2x2 places of these       -> their first principal components      first 3x3 /2 of h_a, last x2 of h_s
         -> 2x2 places of these       -> their first principal components, z   last 3x3 /2 of h_a, first x2 of h_s

From random weights a signal fades on its way through the networks, nothing is left of it after rounding, and most of a
short training goes by until it is. Of z nothing is ever left then: in a prior that begins wide it costs more than it
says, and it learns to say nothing before it learns what to say. The Karhunen-Loeve transform is the best linear one
for a squared error at high rates, in two steps of two by two places nearly that of four by four. Everything else in
the networks starts as the identity: residual branches end with zero, slopes of activations are one. Priors start with
the components' deviations.

Sources: the transform, Goyal, "Theoretical foundations of transform coding", IEEE Signal Processing Magazine 2001.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from pretrain.codec.coder import LATENT_STRIDE
from pretrain.codec.entropy import narrow_prior
from pretrain.codec.network import CodecNetwork

# Deviations of the first components of y2 and of z in steps of the quantizer: of y2 between the rates that a codec of
# features is used at; z says what is worth its bits at all of them.
STEPS, Z_STEPS = 4.0, 2.0
ENOUGH = 2**13  # places of y2 that components are estimated from


def num_images(image_size: int) -> int:
    """How many images of a size give enough places."""
    return -(-ENOUGH // (image_size // LATENT_STRIDE) ** 2)


@torch.no_grad()
def begin_as_klt(codec: CodecNetwork, f2: Iterable[Tensor]) -> None:
    """Set g_a, g_s, h_a, h_s and the prior of z, in place.

    Args:
        f2: batches (N, C1, h, w) of the features that will be coded, h and w multiples of 16. They are kept.
    """
    features = torch.cat([each.float() for each in f2])
    down, widen, out = codec.g_a.convolutions
    up, narrow, last = codec.g_s.convolutions
    passed = min(widen.in_channels, widen.out_channels)
    first = Components.of(_blocks(features), passed)
    projected = first.project(features)
    second = Components.of(_blocks(projected), out.out_channels)
    step = second.step(STEPS)

    _analyse(down, first)
    _synthesize(last, first)
    for module in (widen, narrow):
        _pass_on(module, passed)
    _analyse(out, second, 1 / step)
    _synthesize(up, second, step)

    # Channels without a component, where the latent is wide, are zero as yet for all that the hyperprior knows.
    y2 = second.project(projected) / step
    padding = out.out_channels - len(second.deviations)
    _begin_hyperprior(codec, nn.functional.pad(y2, (0, 0, 0, 0, 0, padding)))


def _begin_hyperprior(codec: CodecNetwork, y2: Tensor) -> None:
    """Set h_a, h_s and the prior of z: the means of y2 (N, latent_channels, h, w) are what z keeps of it."""
    read, halve, quarter, write = codec.h_a.convolutions
    spread, double, quadruple, head = codec.h_s.convolutions
    passed = min(read.in_channels, read.out_channels)
    first = Components.of(_blocks(y2[:, :passed]), halve.out_channels)
    second = Components.of(_blocks(first.project(y2[:, :passed])), min(quarter.out_channels, write.out_channels))
    step, kept = second.step(Z_STEPS), len(second.deviations)

    _pass_on(read, passed)
    _analyse(halve, first)
    _analyse(quarter, second, 1 / step)
    write.weight.zero_()
    write.bias.zero_()  # type: ignore[union-attr]
    _pass_on(write, kept)

    _pass_on(spread, kept)
    _shuffle(double, second, step)
    _shuffle(quadruple, first)
    head.weight.zero_()  # what z says of scales comes later
    _pass_on(head, passed)

    z = codec.h_a(y2)
    narrow_prior(codec.entropy.z, z.std((0, 2, 3), correction=0))
    means, _ = codec.h_s(z.round())
    _, scales = head.bias.chunk(2)  # type: ignore[union-attr]
    scales.copy_((y2 - means).std((0, 2, 3), correction=0).clamp_min(float(codec.entropy.y2.lower_bound_scale.bound)))


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

    def step(self, steps: float) -> Tensor:
        """Of a quantizer, so that the first component deviates by so many of them; one where nothing deviates."""
        greatest = self.deviations[0]
        return torch.where(greatest > 0, greatest, 1.0) / steps

    def project(self, maps: Tensor) -> Tensor:
        """Components (N, K, h/2, w/2) of maps (N, C, h, w)."""
        offset = -torch.einsum("kcab,cab->k", self.vectors, self.mean)
        return nn.functional.conv2d(maps, self.vectors, offset, stride=2)


def _blocks(maps: Tensor) -> Tensor:
    """Maps (N, C, h, w) cut into blocks (N * h/2 * w/2, C, 2, 2)."""
    return nn.functional.pixel_unshuffle(maps, 2).movedim(1, -1).reshape(-1, maps.shape[1], 2, 2)


def _places(module: nn.Conv2d | nn.ConvTranspose2d) -> tuple[slice, slice]:
    """Of 2x2 places in a kernel that moves by two: the rows and columns that it shares least with its neighbours."""
    centre = module.kernel_size[0] // 2
    return slice(centre, centre + 2), slice(centre, centre + 2)


def _analyse(module: nn.Conv2d, components: Components, scale: Tensor | float = 1.0) -> None:
    """Make a convolution give components, of the first channels that it reads; the others are not looked at yet."""
    count, channels = components.vectors.shape[:2]
    assert module.bias is not None
    module.weight[:count].zero_()
    module.weight[:count, :channels, *_places(module)] = components.vectors * scale
    module.weight[:, channels:].zero_()
    module.bias[:count] = -torch.einsum("kcab,cab->k", components.vectors, components.mean) * scale


def _synthesize(module: nn.ConvTranspose2d, components: Components, scale: Tensor | float = 1.0) -> None:
    """Make a transposed convolution of components give the blocks; channels beyond these stay as they are."""
    count, channels = components.vectors.shape[:2]
    assert module.bias is not None
    module.weight[:, :channels].zero_()
    module.weight[:count, :channels, *_places(module)] = components.vectors * scale
    module.bias[:channels] = components.mean.mean((1, 2))


def _shuffle(module: nn.Conv2d, components: Components, scale: Tensor | float = 1.0) -> None:
    """Make a 1x1 convolution of components give the blocks as `nn.PixelShuffle(2)` takes them."""
    count, channels = components.vectors.shape[:2]
    assert module.bias is not None
    module.weight[: 4 * channels].zero_()
    module.weight[: 4 * channels, :count, 0, 0] = (components.vectors * scale).flatten(1).T
    module.weight[:, count:].zero_()
    module.bias[: 4 * channels] = components.mean.flatten()


def _pass_on(module: nn.Conv2d, count: int) -> None:
    """Make a convolution hand its first channels on; what it adds to them comes later."""
    centre = module.kernel_size[0] // 2
    assert module.bias is not None
    module.weight[:count].zero_()
    module.weight[:count, :count, centre, centre] = torch.eye(count, device=module.weight.device)
    module.bias[:count].zero_()
