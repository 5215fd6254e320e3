"""Entropy models: likelihoods for training, and integer symbols to bytes by rANS.

y1 and z follow factorized priors, y2 a Gaussian with mean and scale from the hyperprior (Ballé et al. 2018, Minnen
et al. 2018); all from compressai, whose rANS codes the symbols. Two things are ours. The quantiles of the factorized
priors are solved by bisection when tables are built, so there is no auxiliary loss and no second optimizer. And the
coder's integer tables are part of an exported codec: computed once, they cannot differ between machines.

Likelihoods are computed in float32 under any autocast.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from compressai import ans
from compressai.entropy_models import EntropyBottleneck, EntropyModel, GaussianConditional
from compressai.ops import quantize_ste
from torch import Tensor, nn

# compressai's table of scales: 64 from 0.11 to 256, in geometric steps.
SCALE_MIN, SCALE_MAX, SCALE_LEVELS = 0.11, 256.0, 64


def scale_table() -> list[float]:
    """The Gaussian scales that the coder has tables for, ascending."""
    step = (SCALE_MAX / SCALE_MIN) ** (1 / (SCALE_LEVELS - 1))
    return [SCALE_MIN * step**level for level in range(SCALE_LEVELS)]


def bottleneck_likelihood(model: EntropyBottleneck, values: Tensor) -> tuple[Tensor, Tensor]:
    """Values (N, C, H, W) as the decoder will see them, and their likelihoods in (0, 1].

    With noise in place of rounding while `model` is in training mode, rounded about its medians otherwise.
    """
    with torch.autocast(values.device.type, enabled=False):
        return model(values.float())


class LatentEntropy(nn.Module):
    """The models of z (N, z_channels, ...) and of y2 (N, latent_channels, ...)."""

    def __init__(self, z_channels: int):
        super().__init__()
        self.z = EntropyBottleneck(z_channels)
        self.y2 = GaussianConditional(scale_table())

    def y2_likelihood(self, y2: Tensor, means: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
        """y2_hat and the likelihoods of y2.

        In training the rate sees noise and y2_hat is rounded with a straight-through gradient: the rate stays
        smooth, and the decoder meets the values that it will decode (Minnen and Singh 2020).
        """
        with torch.autocast(y2.device.type, enabled=False):
            y2, means, scales = y2.float(), means.float(), scales.float()
            y2_hat, likelihoods = self.y2(y2, scales, means)
            if self.training:
                y2_hat = quantize_ste(y2 - means) + means
        return y2_hat, likelihoods


@dataclass(frozen=True)
class CoderTable:
    """Integer tables of one entropy model, as rANS wants them: cumulative counts, their lengths, offsets."""

    cdf: Tensor  # (tables, longest) int32
    lengths: Tensor  # (tables,) int32
    offsets: Tensor  # (tables,) int32
    _lists: tuple[list[list[int]], list[int], list[int]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # rANS takes lists; made once, for they are long.
        lists = (self.cdf.tolist(), self.lengths.tolist(), self.offsets.tolist())
        object.__setattr__(self, "_lists", lists)

    @classmethod
    def of(cls, model: EntropyModel) -> CoderTable:
        """Take the tables out of a compressai model that was just updated, leaving its buffers empty.

        Left in, the buffers would change the shape of the state dict with every update.
        """
        table = cls(*(getattr(model, name).int().cpu() for name in _BUFFERS))
        for name in _BUFFERS:
            setattr(model, name, torch.IntTensor().to(getattr(model, name).device))
        return table

    def encode(self, symbols: Tensor, indexes: Tensor) -> bytes:
        """Bytes of integer symbols, each coded by the table that `indexes` names; both flat int32."""
        return ans.RansEncoder().encode_with_indexes(symbols.tolist(), indexes.tolist(), *self._lists)

    def decode(self, payload: bytes, indexes: Tensor) -> Tensor:
        """The symbols (flat int32) of `payload`."""
        return torch.tensor(
            ans.RansDecoder().decode_with_indexes(payload, indexes.tolist(), *self._lists), dtype=torch.int32
        )


_BUFFERS = ("_quantized_cdf", "_cdf_length", "_offset")


@dataclass(frozen=True)
class CoderTables:
    """The tables of z and y2, and the medians of z; what an exported codec carries beside its weights."""

    z: CoderTable
    y2: CoderTable

    @classmethod
    def build(cls, entropy: LatentEntropy) -> CoderTables:
        """Tables from the models' parameters; z's quantiles must be solved."""
        entropy.z.update(force=True)
        entropy.y2.update()
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


def solve_quantiles(model: EntropyBottleneck) -> None:
    """Set medians and tails of a factorized prior by compressai's bisection."""
    with torch.no_grad():
        model.update(force=True, update_quantiles=True)
    CoderTable.of(model)
