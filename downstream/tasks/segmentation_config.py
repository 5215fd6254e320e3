"""Options of semantic segmentation, and what its trainings follow from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from downstream.errors import TaskError
from downstream.latent_config import LatentConfig


@dataclass
class SegmentationConfig(LatentConfig):
    """Options of a semantic segmentation; defaults are Liu's where he gives them."""

    least_images: ClassVar[int] = 2  # the norm behind ASPP's pooling

    codec: str | None = None  # latents=codec: exported codec, folder or hub id
    task: str = "semantic_segmentation"
    gate: str | None = "dynamic"

    backbone: str | None = None  # of the DeepLabv3; the codec's if not given, without a codec resnet50
    teacher: str | None = None  # weights of a DeepLabv3; trained first if not given
    start: str = "codec"  # the ResNet before training: that of the codec, where it is the same; or random

    height: int = 512  # of training crops, pixels
    width: int = 1024
    short_side: int | None = None  # images are resized to it before all else; none: they keep their size
    scale_min: float = 0.5  # of training images, relative to the size at which one just fits the crop
    scale_max: float = 2.0
    epochs: int = 400
    teacher_epochs: int = 400
    transform_epochs: int = 0  # gate and transform learn F_gt by themselves, before the student: far less work a step
    drop_at: float = 0.75  # share of the steps after which the learning rate is a tenth
    optimizer: str = "adam"
    lr: float = 1e-3
    weight_decay: float = 0.0
    batch_size: int = 8

    def validate(self) -> None:
        """As `FinetuneConfig.validate`."""
        super().validate()
        if self.gate is None:
            raise TaskError("gate=null: semantic_segmentation reads latents; gate=none takes all their channels")
        if self.start not in ("codec", "random"):
            raise TaskError(f"start={self.start} is unknown; use one of codec, random")
        self.at_least(1, "teacher_epochs")
        self.at_least(0, "transform_epochs")
        for key in ("height", "width", "short_side"):
            if (value := getattr(self, key)) is not None and value < 64:
                raise TaskError(f"{key}={value} is impossible; it must be at least 64")
        if not 0.1 <= self.scale_min <= self.scale_max <= 10:
            raise TaskError(f"scale_min={self.scale_min:g} scale_max={self.scale_max:g}: must rise within 0.1..10")
        self.within(0.01, 1.0, "drop_at")

    def needs_codec(self) -> bool:
        """Other latents need none."""
        return self.latents == "codec"

    @property
    def begins_with_transform(self) -> bool:
        """Whether gate and transform are trained by themselves first: where F_gt is compared with, in a new network."""
        return self.transform_epochs > 0 and self.distils and self.init is None

    @property
    def needs_teacher(self) -> bool:
        """Whether a student is trained that starts from a teacher, or is compared with its F_gt."""
        return self.epochs > 0 and (self.init is None or self.distils)

    def stages(self, num_samples: int) -> dict[str, int]:
        """The teacher first, where one is needed and none is given; the transform, where the student is a new one."""
        steps = num_samples // self.batch_size
        if self.input == "pixels":
            return {"pixels": self.epochs * steps}
        epochs = {"student": self.epochs}
        if self.begins_with_transform:
            epochs = {"transform": self.transform_epochs, **epochs}
        if self.teacher is None and self.needs_teacher:
            epochs = {"teacher": self.teacher_epochs, **epochs}
        return {stage: count * steps for stage, count in epochs.items()}
