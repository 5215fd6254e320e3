"""What a stage minimises: one module for each kind of loss, so that DDP and `torch.compile` wrap all of a step.

Each takes normalised views (N, 3, H, W) and returns `Losses`: the scalar to descend on and the parts of it that
the log names. The rate is in bits per pixel of the view, from likelihoods (N, ...) in (0, 1].
Source: DICM (Tang, Yi, Wang 2025), with the weights of section 3 of the plan in the recipes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.codec.backbone import HEAD_STRIDE, Backbone, crop_to, pad_to
from pretrain.codec.coder import Z_STRIDE
from pretrain.codec.entropy import bits_per_image
from pretrain.codec.feature_codec import FeatureCodec
from pretrain.config import StageConfig
from pretrain.ssl.methods import Method


class Losses(NamedTuple):
    """`total` is what is minimised; `parts` are detached scalars by name."""

    total: Tensor
    parts: dict[str, Tensor]


def bits_per_pixel(likelihoods: Iterable[Tensor], images: Tensor) -> Tensor:
    """Estimated rate (N,) of each image: -log2 of its likelihoods over the pixels of `images` (N, 3, H, W)."""
    return bits_per_image(likelihoods) / (images.shape[-2] * images.shape[-1])


def l1_distance(f2: Tensor, f1: Tensor, relative: bool) -> Tensor:
    """Mean |f1 - f2|; `relative` divides it by the mean |f1|."""
    target = f1.detach() if relative else f1
    distance = F.l1_loss(f2.float(), target.float())
    return distance / target.float().abs().mean().clamp_min(1e-6) if relative else distance


def mse_distance(output: Tensor, target: Tensor, relative: bool, shares: Tensor | None = None) -> Tensor:
    """Mean squared difference; `relative` divides it by the mean square of the target.

    With `shares` (N,) that of each image counts so many times.
    """
    distance = F.mse_loss(output.float(), target.float(), reduction="mean" if shares is None else "none")
    if shares is not None:
        distance = (distance.flatten(1).mean(dim=1) * shares).mean()
    return distance / target.float().square().mean().clamp_min(1e-12) if relative else distance


def tail_distances(
    backbone: Backbone, features: Tensor, target: Tensor, stage: StageConfig, shares: Tensor | None = None
) -> tuple[Tensor | float, dict[str, Tensor]]:
    """Fidelity where tasks read: `sum_k stage.features[k] * MSE(layer k)` of the tail over `features` and `target`.

    `shares` as in `mse_distance`. Returns the sum and the distances by layer; 0 and none, without running the tail,
    where all weights are 0.
    """
    if not any(stage.features):
        return 0.0, {}
    with torch.no_grad():
        targets = backbone.tail(target)
    distances = [
        mse_distance(output, wanted, stage.relative, shares)
        for output, wanted in zip(backbone.tail(features), targets, strict=True)
    ]
    total = torch.stack([weight * distance for weight, distance in zip(stage.features, distances, strict=True)]).sum()
    return total, {f"layer{k}": distance.detach() for k, distance in enumerate(distances, start=2)}


class ContrastObjective(nn.Module):
    """Stages `ssl` and `joint`: the contrastive loss, with RE in the path its rate and L1(f1, f2) as well."""

    def __init__(self, method: Method, stage: StageConfig):
        super().__init__()
        self.method = method
        self.stage = stage

    def forward(self, view0: Tensor, view1: Tensor, rate_weight: Tensor) -> Losses:
        contrast, outputs = self.method(view0, view1)
        total = self.stage.contrast * contrast
        parts = {"contrast": contrast.detach()}
        if outputs[0].f2 is not None:
            bpp = torch.stack([bits_per_pixel([output.y1_likelihoods], view0).mean() for output in outputs]).mean()
            distortion = torch.stack(
                [l1_distance(output.f2, output.f1, self.stage.relative) for output in outputs]
            ).mean()
            total = total + rate_weight * bpp + self.stage.distortion * distortion
            parts |= {"bpp": bpp.detach(), "distortion": distortion.detach()}
        return Losses(total, parts)


class RedundancyObjective(nn.Module):
    """Stage `redundancy`: RE learns to keep f1 under a rate; the backbone around it is frozen."""

    def __init__(self, codec: FeatureCodec, stage: StageConfig):
        super().__init__()
        assert codec.redundancy is not None
        self.redundancy = codec.redundancy
        self.frozen = (codec.backbone,)  # a tuple hides it from DDP and from train()
        self.stage = stage

    def forward(self, view: Tensor, rate_weight: Tensor) -> Losses:
        (backbone,) = self.frozen
        with torch.no_grad():
            f1 = backbone.head(view)
        f2, likelihoods = self.redundancy(f1)
        bpp = bits_per_pixel([likelihoods], view).mean()
        distortion = l1_distance(f2, f1, self.stage.relative)
        total = rate_weight * bpp + self.stage.distortion * distortion
        fidelity, parts = tail_distances(backbone, f2, f1, self.stage)
        return Losses(total + fidelity, {"bpp": bpp.detach(), "distortion": distortion.detach(), **parts})


def compression_modules(codec: FeatureCodec) -> list[nn.Module]:
    """The compression network: what is trained to code f2."""
    optional = (codec.context, codec.y2_gain, codec.z_gain)
    parts = [codec.g_a, codec.g_s, codec.h_a, codec.h_s, codec.entropy, *optional]
    return [part for part in parts if part is not None]


class CompressionObjective(nn.Module):
    """Stage `codec`: the compression network learns f2 -> f3 under the rate of y2 and z.

    Fidelity is asked for where tasks read: MSE(f2, f3) and the same for the tail's layer2, layer3 and layer4. For a
    codec with a range of rates each image draws one of the trained rates, and its bits weigh what that rate's do. As a
    whole, the loss of an image counts weight^-balance as much: it grows about as weight^0.4, so that all rates pull
    alike at what they share.
    """

    def __init__(self, codec: FeatureCodec, stage: StageConfig):
        super().__init__()
        self.transforms = nn.ModuleList(compression_modules(codec))
        self.codec = (codec,)
        self.stage = stage

    def forward(self, view: Tensor, rate_weight: Tensor) -> Losses:
        (codec,) = self.codec
        height, width = view.shape[-2:]
        with torch.no_grad():
            f2, _ = codec.eliminate(codec.backbone.head(pad_to(view, Z_STRIDE)))
        rate, weights, shares = None, rate_weight, torch.ones(len(view), device=view.device)
        if self.stage.rates:
            points = torch.randint(len(self.stage.rates), (len(view),), device=view.device)
            rate = points / (len(self.stage.rates) - 1)
            of_points = torch.tensor(self.stage.rates, device=view.device)
            weights, shares = of_points[points], balanced(of_points, self.stage.balance)[points]
        f3, likelihoods = codec.compress_features(f2, rate, (height, width))
        f2, f3 = (crop_to(features, height, width, HEAD_STRIDE) for features in (f2, f3))
        bpp = bits_per_pixel(likelihoods.values(), view)
        distortion = mse_distance(f3, f2, self.stage.relative, shares)
        total = (shares * weights * bpp).mean() + self.stage.distortion * distortion
        fidelity, parts = tail_distances(codec.backbone, f3, f2, self.stage, shares)
        return Losses(total + fidelity, {"bpp": bpp.mean().detach(), "distortion": distortion.detach(), **parts})


def balanced(rates: Tensor, balance: float) -> Tensor:
    """How many times the loss at each of the rates with these weights (P,) counts; 1 on average."""
    shares = rates**-balance
    return shares / shares.mean()
