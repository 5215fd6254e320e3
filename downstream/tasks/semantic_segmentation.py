"""Semantic segmentation of gated latents: latent -> gate -> transform -> DeepLabv3 without stem and layer1.

    x -> frozen codec -> y_hat -> gate -> transform -> F -> layer2..4 -> ASPP -> logits       (student)
    x -> frozen stem and layer1 of a DeepLabv3 that was trained on raw images -> F_gt         (teacher)

Loss: cross-entropy + 1.0 * MSE(F, F_gt). Adam, 1e-3, then 1e-4 after three quarters of the epochs. The metric is mean
IoU over the classes that occur, in the truth or the prediction; pixels of class 255 count nowhere.

Source: Liu, Sun, Katto 2022, sections 2 and 3.1.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from omegaconf import MISSING
from torch import Tensor, nn
from torchmetrics.classification import MulticlassConfusionMatrix

from downstream.compressai_latents import create_latents, load_model
from downstream.errors import TaskError
from downstream.gate import GATES, Gate
from downstream.latents import FeatureLatents, LatentCodec, Received
from downstream.tasks.deeplab import DeepLab, enlarge
from downstream.tasks.masked_images import IGNORE
from downstream.transform import TRANSFORMS, LatentTransform
from pretrain.codec.feature_codec import FeatureCodec
from pretrain.coding import read_channels


@dataclass
class SegmentationConfig:
    """Everything that a training of semantic segmentation depends on; defaults are Liu's where he gives them."""

    data: str = MISSING  # folder with dataset.json and shards
    run: str = "runs/segmentation"
    codec: str | None = None  # latents=codec: exported codec, folder or hub id
    latents: str = "codec"  # or a model of CompressAI's zoo: bmshj2018-hyperprior is the paper's
    quality: int = 4  # of a zoo model's weights
    metric: str = "mse"
    weights: str = "zoo"  # or a file
    rate: float | None = None  # latents=codec: 0..1, of a codec with a range of rates

    gate: str = "dynamic"
    num_channels: int = 32  # gate=variance: how many are kept
    channels: str | None = None  # gate=static: file that `dicm select-channels` wrote
    transform: str = "deconv"
    backbone: str = "resnet50"
    teacher: str | None = None  # weights of a DeepLabv3; trained first where none are given
    start: str = "codec"  # the teacher's ResNet before training: that of `codec` where it is the same; or random
    feature_weight: float = 1.0  # of MSE(F, F_gt)

    height: int = 512  # of training crops, pixels
    width: int = 1024
    short_side: int | None = None  # images are resized to it first
    scale_min: float = 0.5  # of training images, relative to the size at which one just fits the crop
    scale_max: float = 2.0
    epochs: int = 400
    teacher_epochs: int = 400
    drop_at: float = 0.75  # share of the epochs after which the learning rate is a tenth
    lr: float = 1e-3
    batch_size: int = 8
    precision: str = "bf16"
    seed: int = 0

    def validate(self) -> None:
        """Refuse what cannot work, before any work starts (TaskError)."""
        for key, valid in {
            "gate": GATES,
            "transform": TRANSFORMS,
            "start": ("codec", "random"),
            "precision": ("fp32", "bf16"),
        }.items():
            if (value := getattr(self, key)) not in valid:
                raise TaskError(f"{key}={value} is unknown; use one of {', '.join(valid)}")
        if (self.latents == "codec") != (self.codec is not None):
            given = f"latents={self.latents} codec={self.codec}"
            raise TaskError(f"{given}: a codec is named where its latents are read, latents=codec, and only there")
        if (self.gate == "static") != (self.channels is not None):
            given = f"gate={self.gate} channels={self.channels}"
            raise TaskError(f"{given}: gate=static needs the file of `dicm select-channels`, other gates take none")
        for key in ("num_channels", "epochs", "teacher_epochs", "batch_size"):
            if getattr(self, key) < 1:
                raise TaskError(f"{key}={getattr(self, key)} is impossible; it must be at least 1")
        for key in ("height", "width", "short_side"):
            if (value := getattr(self, key)) is not None and value < 64:
                raise TaskError(f"{key}={value} is impossible; it must be at least 64")
        if not 0.1 <= self.scale_min <= self.scale_max <= 10:
            raise TaskError(f"scale_min={self.scale_min:g} scale_max={self.scale_max:g}: must rise within 0.1..10")
        if self.lr <= 0 or self.feature_weight < 0 or not 0 < self.drop_at <= 1:
            raise TaskError(
                f"lr={self.lr:g}, feature_weight={self.feature_weight:g}, drop_at={self.drop_at:g}: "
                "must be positive, not negative, and a share in 0..1"
            )


def create_latent_codec(config: SegmentationConfig, device: torch.device) -> LatentCodec:
    """The frozen latents that `config` names (CodecError, TaskError: unusable)."""
    if config.codec is not None:
        return FeatureLatents(FeatureCodec.from_pretrained(config.codec), device, config.rate)
    return create_latents(load_model(config.latents, config.quality, config.weights, config.metric), device)


def chosen_channels(config: SegmentationConfig) -> list[int] | None:
    """The channels of gate=static; None for the gates that choose by themselves."""
    return None if config.channels is None else read_channels(Path(config.channels))


class SegmentationNetwork(nn.Module):
    """The student: logits of latents.

    Args:
        gate: over the latent's channels.
        kind: of the transform.
        teacher: its part behind F is where the student's starts; the teacher itself is not changed.
    """

    def __init__(self, gate: Gate, kind: str, teacher: DeepLab):
        super().__init__()
        self.gate = gate
        self.transform = LatentTransform(kind, gate.num_inputs, teacher.channels)
        self.tail = copy.deepcopy(teacher.tail).requires_grad_(True)

    def forward(self, y_hat: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Logits (N, num_classes, height, width) and F (N, C1, ceil(height/4), ceil(width/4)) of images' y_hat.

        Args:
            y_hat: (N, C, h, w), all channels; the gate takes its own.
            height, width: of the images, pixels.
        """
        return self._read(self.transform(self.gate(y_hat)), height, width)

    def from_base(self, received: Received) -> Tensor:
        """Logits (1, num_classes, height, width) of what a stream's base gave; only its channels are computed with."""
        # A static gate's transform has no other inputs than its channels; a dynamic one's has all of them.
        channels = received.channels if self.gate.num_inputs == self.gate.channels else None
        if channels is None and received.latents.shape[1] != self.gate.num_inputs:
            raise TaskError(
                f"stream carries {received.latents.shape[1]} channels, this network reads {self.gate.num_inputs}; "
                "encode with the channels that it was trained on"
            )
        features = self.transform(received.latents, channels)
        return self._read(features, received.height, received.width)[0]

    def _read(self, features: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
        features = features[..., : -(-height // 4), : -(-width // 4)]
        return enlarge(self.tail(features).float(), height, width), features


def segmentation_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Cross-entropy of logits (N, K, H, W) and masks (N, H, W) int64 over the pixels that count; 0 where none does."""
    losses = F.cross_entropy(logits.float(), masks, ignore_index=IGNORE, reduction="sum")
    return losses / (masks != IGNORE).sum().clamp(min=1)


def student_loss(logits: Tensor, masks: Tensor, features: Tensor, target: Tensor, weight: float) -> Tensor:
    """L = cross-entropy + weight * MSE(F, F_gt) (Liu, equations 1 to 3)."""
    return segmentation_loss(logits, masks) + weight * F.mse_loss(features.float(), target.float())


def learning_rate(config: SegmentationConfig, progress: float) -> float:
    """At `progress` 0..1 of the run: `lr`, a tenth of it after `drop_at`."""
    return config.lr if progress < config.drop_at else 0.1 * config.lr


class SegmentationMetric:
    """Confusion of pixels, gathered image by image; its matrix adds up over ranks."""

    def __init__(self, num_classes: int):
        self.matrix = MulticlassConfusionMatrix(num_classes, ignore_index=IGNORE)

    def update(self, predicted: Tensor, masks: Tensor) -> None:
        """Add classes (N, H, W) predicted for masks (N, H, W)."""
        self.matrix.update(predicted.cpu(), masks.cpu().long())

    def confusion(self) -> Tensor:
        """(K, K) float64: pixels of a true class (row) by the class predicted (column)."""
        return self.matrix.confmat.double()

    def results(self) -> dict[str, float]:
        """`miou` and `pixel_accuracy`, 0..1."""
        return scores(self.confusion())


def scores(confusion: Tensor) -> dict[str, float]:
    """Mean IoU over classes that occur in truth or prediction, and accuracy over pixels, of a confusion (K, K)."""
    hits = confusion.diagonal()
    union = confusion.sum(0) + confusion.sum(1) - hits
    occurs = union > 0
    miou = (hits[occurs] / union[occurs]).mean() if bool(occurs.any()) else torch.tensor(0.0)
    return {"miou": float(miou), "pixel_accuracy": float(hits.sum() / confusion.sum().clamp(min=1))}


def constant_scores(confusion: Tensor) -> dict[str, float]:
    """What predicting the most frequent class everywhere would score on the truth behind a confusion (K, K)."""
    truth = confusion.sum(1)
    constant = torch.zeros_like(confusion)
    constant[:, truth.argmax()] = truth
    return scores(constant)
