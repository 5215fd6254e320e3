"""Options of the self-supervised methods and of the heatmap; reading them imports no torch."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field

from pretrain.errors import ConfigError

METHODS = ("moco", "simsiam", "byol", "simclr")
CAMS = ("eigencam", "kpca_cam", "fem")  # grad-cam's methods that need neither a class nor gradients
HEATMAPS = ("activation", *CAMS)
LAYERS = ("layer1", "layer2", "layer3", "layer4")
STRIDE = 32  # of layer4 and of RE's y1


@dataclass
class HeatmapConfig:
    """Where in an image its two crops may lie."""

    method: str = "activation"  # of HEATMAPS, or none: unguided crops
    layer: str = "layer4"  # whose feature map is read; layer3 for images under about 100 px
    size: int = 128  # pixels of the side at which the momentum encoder sees the whole image
    threshold: float = 0.1  # of the heatmap's maximum; what lies above is inside the box
    warmup: float = 10.0  # epochs before crops are guided

    def validate(self) -> None:
        """Refuse impossible values (ConfigError)."""
        _one_of("ssl.heatmap.method", self.method, (*HEATMAPS, "none"))
        _one_of("ssl.heatmap.layer", self.layer, LAYERS)
        if self.size < STRIDE or self.size % STRIDE:
            raise ConfigError(
                f"ssl.heatmap.size={self.size} is not a positive multiple of {STRIDE}, the backbone's stride"
            )
        if not 0 <= self.threshold < 1:
            raise ConfigError(f"ssl.heatmap.threshold={self.threshold:g} must lie in 0..1, 1 excluded")
        if self.warmup < 0:
            raise ConfigError(f"ssl.heatmap.warmup={self.warmup:g} must be 0 epochs or more")


@dataclass
class SSLConfig:
    """A method and its sizes; the defaults are MoCo v2's (Chen, Fan, Girshick, He 2020)."""

    method: str = "moco"
    dim: int = 128  # of the embeddings that the loss compares; SimSiam's authors 2048, BYOL's 256
    hidden_dim: int = 2048  # of the heads' hidden layers; BYOL's authors 4096
    queue: int = 65536  # moco: keys of earlier batches that serve as negatives
    momentum: float = 0.999  # of the momentum encoder; byol starts here and rises to 1 (authors: 0.996)
    temperature: float = 0.2  # moco, simclr
    heatmap: HeatmapConfig = field(default_factory=HeatmapConfig)

    def validate(self) -> None:
        """Refuse impossible values (ConfigError)."""
        _one_of("ssl.method", self.method, METHODS)
        for key in ("dim", "hidden_dim", "queue"):
            if getattr(self, key) < 1:
                raise ConfigError(f"ssl.{key}={getattr(self, key)} is impossible; it must be at least 1")
        if not 0 <= self.momentum <= 1:
            raise ConfigError(f"ssl.momentum={self.momentum:g} must lie in 0..1")
        if self.temperature <= 0:
            raise ConfigError(f"ssl.temperature={self.temperature:g} must be above 0")
        self.heatmap.validate()


def nearest(value: str, valid: Sequence[str]) -> str:
    """The valid names most like `value`, for a message: "a or b"; all of them where none is alike."""
    return " or ".join(difflib.get_close_matches(value, valid, n=2, cutoff=0.4) or valid)


def _one_of(key: str, value: str, valid: Sequence[str]) -> None:
    if value not in valid:
        raise ConfigError(f"{key}={value} is unknown; use {nearest(value, valid)}")
