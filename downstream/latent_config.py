"""Options of tasks that can read gated latents of a frozen codec, or of a model of CompressAI's."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from downstream.config import FinetuneConfig
from downstream.errors import TaskError
from downstream.gate import GATES
from downstream.transform import TRANSFORMS
from pretrain.coding import read_channels


@dataclass
class LatentConfig(FinetuneConfig):
    """Options of a task that can read gated latents: which, and how."""

    latents: str = "codec"  # y2 of the codec; or a model of CompressAI's zoo: bmshj2018-hyperprior is the paper's
    latents_quality: int = 4  # of a zoo model's weights, or the rate of a -vbr model
    latents_metric: str = "mse"
    latents_weights: str = "zoo"  # or a file

    gate: str | None = None  # dynamic, static, variance or none
    num_channels: int = 32  # gate=variance: how many are kept
    channels: str | None = None  # gate=static: file that `dicm select-channels` wrote
    chosen: list[int] = field(default_factory=list)  # what that file says
    transform: str = "deconv"  # or res; or synthesis, which begins as the codec's own
    feature_weight: float = 1.0  # of MSE(F, F_gt)

    @property
    def reads_latents(self) -> bool:
        """Whether a gate over latents is what the task reads through."""
        return self.gate is not None and self.input == "streams"

    @property
    def distils(self) -> bool:
        """Whether the loss compares F with features of pixels."""
        return self.reads_latents and self.feature_weight > 0

    def validate(self) -> None:
        """As `FinetuneConfig.validate`."""
        if self.gate is not None and self.gate not in GATES:
            raise TaskError(f"gate={self.gate} is unknown; use one of {', '.join(GATES)}")
        if self.transform not in TRANSFORMS:
            raise TaskError(f"transform={self.transform} is unknown; use one of {', '.join(TRANSFORMS)}")
        if self.transform == "synthesis" and self.latents != "codec":
            raise TaskError(
                f"transform=synthesis with latents={self.latents} is impossible; it is the codec's own, "
                "use deconv or res"
            )
        if self.latents == "codec" and self.codec is None:
            raise TaskError("latents=codec needs a codec: codec=DIR; or name a model of CompressAI's: latents=NAME")
        if (self.gate == "static") != (self.channels is not None or bool(self.chosen)):
            given = f"gate={self.gate} channels={self.channels}"
            raise TaskError(f"{given}: gate=static needs the file of `dicm select-channels`, other gates take none")
        if self.num_channels < 1:
            raise TaskError(f"num_channels={self.num_channels} is impossible; it must be at least 1")
        if self.latents != "codec" and self.rate is not None:
            raise TaskError(f"rate with latents={self.latents} is impossible; its rate is latents_quality")
        if self.feature_weight < 0:
            raise TaskError(f"feature_weight={self.feature_weight:g} is impossible; it must not be negative")
        super().validate()

    def read_chosen(self) -> None:
        """Take the channels of gate=static from their file, once (ConfigError: it names none)."""
        if self.channels is None:
            return
        found = read_channels(Path(self.channels))
        if self.chosen and self.chosen != found:
            raise TaskError(f"channels={self.channels} names other channels than chosen={self.chosen[:8]}; give one")
        self.chosen, self.num_channels = found, len(found)
