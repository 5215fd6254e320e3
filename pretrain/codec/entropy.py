"""Entropy models: likelihoods for training, and the integer tables that symbols are coded with.

y1 and z follow factorized priors, y2 a Gaussian with mean and scale from the hyperprior (Ballé et al. 2018,
Minnen et al. 2018); all from compressai. Three things are ours. The quantiles
of the factorized priors are solved by bisection from the prior itself, so there is no auxiliary loss and no
second optimizer. A scale is coded by the nearest table, not the next wider one. And the coder's integer
tables are part of an exported codec: computed once, they cannot differ between machines.

Likelihoods are float32 under any autocast; quantiles and tables are computed on the CPU, whatever device
trains.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from compressai.entropy_models import EntropyBottleneck, EntropyModel, GaussianConditional
from compressai.ops import quantize_ste
from torch import Tensor, nn
from torch.distributions.transforms import SoftplusTransform

from pretrain.errors import CodecError

# compressai's table of scales: 64 from 0.11 to 256, in geometric steps.
SCALE_MIN, SCALE_MAX, SCALE_LEVELS = 0.11, 256.0, 64
# A prior wider than this is cut: its tails are coded by escape, and a table has 2^16 counts to share out.
MAX_TAIL = 4096.0
# The coder counts in int32 and doubles what it escapes; no trained codec comes near.
MAX_SYMBOL = 1 << 24
# A table shares out 2^16 counts, at least one to each of its symbols; what is escaped takes digits of four bits behind.
TABLE_BITS, DIGIT_BITS = 16, 4


def scale_table() -> list[float]:
    """The Gaussian scales that the coder has tables for, ascending."""
    step = (SCALE_MAX / SCALE_MIN) ** (1 / (SCALE_LEVELS - 1))
    return [SCALE_MIN * step**level for level in range(SCALE_LEVELS)]


def scale_indexes(scales: Tensor, guard: float = 0.0) -> tuple[Tensor, Tensor]:
    """The table (int32) whose scale is nearest, in ratio, to each of `scales` (float64), and which are close calls.

    compressai takes the next wider table; the nearest costs a quarter of its excess bits. A close call (bool) lies
    nearer to a bound between two tables than `guard` of that bound.
    """
    table = scale_table()
    bounds = [math.sqrt(low * high) for low, high in pairwise(table)]
    boundaries = torch.tensor(bounds, dtype=torch.float64, device=scales.device)
    indexes = torch.bucketize(scales.contiguous(), boundaries, out_int32=True)
    lower, upper = (boundaries[(indexes - shift).clamp(0, len(bounds) - 1)] for shift in (1, 0))
    close = ((scales - lower).abs() < guard * lower) | ((scales - upper).abs() < guard * upper)
    return indexes, close


def bottleneck_likelihood(
    model: EntropyBottleneck, values: Tensor, gain: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Values (N, C, H, W) as the decoder will see them, and their likelihoods in (0, 1].

    With noise in place of rounding while `model` is in training mode, rounded about its medians otherwise; times
    `gain` (N, C, 1, 1) while they are symbols. What tables of integers give them is `CoderTable.likelihoods`.
    """
    with torch.autocast(values.device.type, enabled=False):
        if gain is None:
            return model(values.float())
        values_hat, likelihoods = model(values.float() * gain)
        return values_hat / gain, likelihoods


def bottleneck_round(model: EntropyBottleneck, values: Tensor) -> Tensor:
    """Values (N, C, H, W) rounded about the medians of `model`, as in a pass in eval mode."""
    return model.quantize(values.float(), "dequantize", model.quantiles[:, :, 1:2, None].transpose(0, 1))


def bits_per_image(likelihoods: Iterable[Tensor]) -> Tensor:
    """Estimated bits (N,) of each image, from the likelihoods (N, ...) of all that is sent."""
    return torch.stack([each.float().log().flatten(1).sum(1) / -math.log(2) for each in likelihoods]).sum(0)


class LatentEntropy(nn.Module):
    """The models of z (N, z_channels, ...) and of y2 (N, latent_channels, ...)."""

    def __init__(self, z_channels: int):
        super().__init__()
        # No symbol of a table costs more than its 16 bits, so neither does one in training.
        bound = 2.0**-TABLE_BITS
        self.z = EntropyBottleneck(z_channels, likelihood_bound=bound)
        self.y2 = GaussianConditional(scale_table(), likelihood_bound=bound)

    def y2_likelihood(
        self, y2: Tensor, means: Tensor, scales: Tensor, gain: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """y2_hat and the likelihoods of y2; `gain` (N, latent_channels, 1, 1) widens its symbols.

        In training the rate sees noise and y2_hat is rounded with a straight-through gradient: the rate stays
        smooth, and the decoder meets the values that it will decode (Minnen and Singh 2020).
        """
        with torch.autocast(y2.device.type, enabled=False):
            factor = torch.ones((), device=y2.device) if gain is None else gain
            residuals = (y2.float() - means.float()) * factor
            _, likelihoods = self.y2(residuals, scales.float() * factor)
            return quantize_ste(residuals) / factor + means.float(), likelihoods


def round_latents(y2: Tensor, means: Tensor, gain: Tensor | None = None) -> Tensor:
    """y2_hat as `y2_likelihood` gives it, without the likelihoods."""
    factor = 1.0 if gain is None else gain
    return quantize_ste((y2.float() - means.float()) * factor) / factor + means.float()


@torch.no_grad()
def narrow_prior(model: EntropyBottleneck, deviations: Tensor) -> None:
    """Let a fresh factorized prior begin with the deviations (C,) of its values.

    compressai's begins as (nearly) a logistic density whose scale is `init_scale` in every channel. It becomes what it
    would be with a scale for each channel, of values with the noise of training, whose variance is 1/12.
    """
    scales = (deviations.square() + 1 / 12).sqrt() * math.sqrt(3) / math.pi
    softplus = SoftplusTransform()
    factor = (model.init_scale / scales) ** (1 / len(model.matrices))
    for matrix in model.matrices:
        matrix.copy_(softplus.inv(softplus(matrix) * factor[:, None, None]))


@torch.no_grad()
def solve_quantiles(model: EntropyBottleneck) -> None:
    """Set the medians and tails of a factorized prior to those of its density.

    compressai's bisection finds them from any parameters, since the cumulative is monotone by construction; a
    prior whose quantiles are right already, to the bisection's tolerance, is left as it is to the bit. Tails
    end at most `MAX_TAIL` from the median.

    Raises:
        CodecError: a parameter is not finite.
    """
    with torch.autocast("cpu", enabled=False):
        solved = copy.deepcopy(model).cpu().float()
        if not all(tensor.isfinite().all() for tensor in solved.parameters()):
            raise CodecError("a factorized prior has parameters that are not finite; training diverged, lower its lr")
        if _quantiles_hold(solved):
            return
        solved._update_quantiles()
        median = solved.quantiles[:, :, 1:2].clone()
        model.quantiles.copy_(torch.minimum(torch.maximum(solved.quantiles, median - MAX_TAIL), median + MAX_TAIL))


def _quantiles_hold(model: EntropyBottleneck) -> bool:
    """Whether each target of the cumulative is met within twice the bisection's tolerance."""
    quantiles = model.quantiles
    slack = 2 * (1e-3 + 1e-4 * quantiles.abs())
    below = model._logits_cumulative(quantiles - slack, stop_gradient=True) <= model.target
    above = model._logits_cumulative(quantiles + slack, stop_gradient=True) >= model.target
    tail = (quantiles - quantiles[:, :, 1:2]).abs() >= MAX_TAIL - slack
    lower, upper = tail.clone(), tail.clone()
    lower[:, :, 1:], upper[:, :, :2] = False, False  # a cut tail lies inside its target
    return bool(((below | upper) & (above | lower)).all())


@dataclass(frozen=True)
class CoderTable:
    """Integer tables of one entropy model, as rANS wants them: cumulative counts, their lengths, offsets."""

    cdf: Tensor  # (tables, longest) int32
    lengths: Tensor  # (tables,) int32
    offsets: Tensor  # (tables,) int32
    _lists: tuple[list[list[int]], list[int], list[int]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # rANS takes lists and copies them at each call: made once, and without the padding.
        lengths = self.lengths.tolist()
        rows = [row[:length] for row, length in zip(self.cdf.tolist(), lengths, strict=True)]
        object.__setattr__(self, "_lists", (rows, lengths, self.offsets.tolist()))

    @classmethod
    def of(cls, model: EntropyModel) -> CoderTable:
        """The tables of a compressai model; the model itself is left as it is."""
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            updated = copy.deepcopy(model).cpu().float()
            if isinstance(updated, EntropyBottleneck):
                updated.update(force=True)
            else:
                updated.update()
        return cls(updated.quantized_cdf.int(), updated.cdf_length.int(), updated.offset.int())

    def likelihoods(self, symbols: Tensor, indexes: Tensor) -> Tensor:
        """2^-bits (float32) that the coder takes for each of `symbols` by table `indexes`, of any one shape.

        To the coder's rounding, about 1e-4 of its bytes; its state comes on top (`symbols.state_bits`).
        """
        cdf, lengths, offsets = (table.to(symbols.device) for table in (self.cdf, self.lengths, self.offsets))
        places, indexes = symbols.long() - offsets[indexes.long()], indexes.long()
        last = (lengths[indexes] - 2).long()
        escaped = (places < 0) | (places >= last)
        places_or_last = torch.where(escaped, last, places)
        counts = cdf[indexes, places_or_last + 1] - cdf[indexes, places_or_last]
        # An escape is followed by the number of its digits and then these, of 4 bits each.
        beyond = torch.where(places < 0, -2 * places - 1, 2 * (places - last)).clamp_min(0)
        digits = (torch.frexp(beyond.double()).exponent + DIGIT_BITS - 1) // DIGIT_BITS
        return counts / 2.0**TABLE_BITS * torch.where(escaped, 2.0 ** (-DIGIT_BITS * (1 + digits)), 1.0)

    def lists(self, indexes: Tensor) -> tuple[list[list[int]], list[int], list[int]]:
        """The tables up to the highest that `indexes` names."""
        count = int(indexes.max()) + 1
        rows, lengths, offsets = self._lists
        return rows[:count], lengths[:count], offsets[:count]


@dataclass(frozen=True)
class CoderTables:
    """The tables of z and y2; what an exported codec carries beside its weights."""

    z: CoderTable
    y2: CoderTable

    @classmethod
    def build(cls, entropy: LatentEntropy) -> CoderTables:
        """Tables from the models' parameters; z's quantiles must be solved."""
        return cls(CoderTable.of(entropy.z), CoderTable.of(entropy.y2))

    def tensors(self) -> dict[str, Tensor]:
        """By name, for a safetensors file."""
        return {
            f"tables.{model}.{name}": getattr(getattr(self, model), name)
            for model in ("z", "y2")
            for name in ("cdf", "lengths", "offsets")
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> CoderTables:
        """The inverse of `tensors`; KeyError where one is missing."""
        z, y2 = (
            CoderTable(*(tensors[f"tables.{model}.{name}"] for name in ("cdf", "lengths", "offsets")))
            for model in ("z", "y2")
        )
        return cls(z, y2)
