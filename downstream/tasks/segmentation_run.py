"""One process's run of semantic segmentation: teacher, student, evaluation on real streams.

RUN/
  config.yaml
  teacher.pt              state dict of the DeepLabv3 that was trained on raw images
  checkpoints/            the student when its training ended
  results.json            losses, mIoU and rate on the validation split, from real streams
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cluster.checkpoint import CheckpointStore
from cluster.recipes import load_saved, save_config
from data_pipeline.views import normalize
from downstream.channels import most_varied
from downstream.errors import TaskError
from downstream.gate import create_gate
from downstream.latents import LatentCodec
from downstream.tasks.deeplab import DeepLab, load_deeplab
from downstream.tasks.masked_images import MaskedImages, TrainingCrops, epochs_of_batches
from downstream.tasks.semantic_segmentation import (
    SegmentationConfig,
    SegmentationMetric,
    SegmentationNetwork,
    chosen_channels,
    constant_scores,
    create_latent_codec,
    learning_rate,
    segmentation_loss,
    student_loss,
)
from pretrain.codec.feature_codec import FeatureCodec

RESULTS, TEACHER = "results.json", "teacher.pt"
Step = Callable[[Tensor, Tensor], Tensor]


class SegmentationRun:
    """Latents, teacher, student and data of one training.

    Args:
        config: validated.
        latents: in place of those that `config` names; to try weights that no file holds.

    Raises:
        TaskError, DataError, CodecError: codec or data are unusable.
    """

    def __init__(self, config: SegmentationConfig, latents: LatentCodec | None = None):
        self.config, self.folder = config, Path(config.run)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.train_set = MaskedImages(config.data, "train", config.short_side)
        self.val_set = MaskedImages(config.data, "val", config.short_side)
        self.latents = latents or create_latent_codec(config, self.device)
        self.crops = TrainingCrops((config.height, config.width), (config.scale_min, config.scale_max))

    def train(self, log: Callable[[str, int, float], None] = lambda *_: None) -> dict[str, Any]:
        """Train what is missing and evaluate; returns the results. `log` gets stage, step and loss."""
        self.folder.mkdir(parents=True, exist_ok=True)
        save_config(self.config, self.folder / "config.yaml")
        start, teacher = time.perf_counter(), self.teacher(log)
        student, losses = self.student(teacher, log)
        results = {
            "latents": self.config.latents,
            "gate": self.config.gate,
            "transform": self.config.transform,
            "loss_first": losses[0],
            "loss_last": losses[-1],
            **self.evaluate(student),
            "seconds": round(time.perf_counter() - start, 1),
        }
        (self.folder / RESULTS).write_text(json.dumps(results, indent=2) + "\n")
        return results

    def teacher(self, log: Callable[[str, int, float], None] = lambda *_: None) -> DeepLab:
        """The frozen DeepLabv3 on raw images: from `teacher`, from this run, or trained now."""
        config, path = self.config, Path(self.config.teacher or self.folder / TEACHER)
        num_classes = len(self.train_set.classes)
        if config.teacher is not None or path.is_file():
            return self._frozen(load_deeplab(path, config.backbone, num_classes))
        torch.manual_seed(config.seed)
        teacher = DeepLab(config.backbone, num_classes).to(self.device)
        if config.start == "codec" and config.codec is not None:
            teacher.start_from(FeatureCodec.from_pretrained(config.codec).backbone)

        def loss(images: Tensor, masks: Tensor) -> Tensor:
            return segmentation_loss(teacher(normalize(images.float() / 255)), masks)

        self._fit(teacher, loss, config.teacher_epochs, "teacher", log)
        torch.save(teacher.state_dict(), path)
        return self._frozen(teacher)

    def student(
        self, teacher: DeepLab, log: Callable[[str, int, float], None] = lambda *_: None
    ) -> tuple[SegmentationNetwork, list[float]]:
        """The trained student and the mean loss of each epoch."""
        student = self.new_student(teacher)

        def loss(images: Tensor, masks: Tensor) -> Tensor:
            y_hat = self.latents.latents(images)
            with torch.no_grad():
                target = teacher.head(normalize(images.float() / 255))
            logits, features = student(y_hat, *images.shape[-2:])
            return student_loss(logits, masks, features, target, self.config.feature_weight)

        losses = self._fit(student, loss, self.config.epochs, "student", log)
        store = CheckpointStore(self.folder / "checkpoints", keep=1)
        store.save(len(losses), {"model": student.state_dict()})
        return student.eval(), losses

    def new_student(self, teacher: DeepLab) -> SegmentationNetwork:
        """The student before training."""
        config, chosen = self.config, chosen_channels(self.config)
        if config.gate == "variance":
            chosen = most_varied(self.latents, self.training_images(), config.num_channels)
        torch.manual_seed(config.seed)
        gate = create_gate(config.gate, self.latents.channels, chosen)
        return SegmentationNetwork(gate, config.transform, teacher).to(self.device)

    def load_student(self) -> SegmentationNetwork:
        """The student of a complete run, from its checkpoint (TaskError: there is none)."""
        store = CheckpointStore(self.folder / "checkpoints")
        if (step := store.newest()) is None:
            raise TaskError(f"{self.folder}: no checkpoint yet; train the run to its end first")
        state = store.load(step)["model"]
        teacher = DeepLab(self.config.backbone, len(self.train_set.classes))
        chosen = state["gate.chosen"].tolist() if "gate.chosen" in state else None
        gate = create_gate(self.config.gate, self.latents.channels, chosen)
        student = SegmentationNetwork(gate, self.config.transform, teacher)
        student.load_state_dict(state)
        return student.to(self.device).eval()

    @torch.no_grad()
    def evaluate(self, student: SegmentationNetwork, dataset: MaskedImages | None = None) -> dict[str, Any]:
        """mIoU and rate from real streams that carry the chosen channels and their list, nothing else."""
        dataset = dataset or self.val_set
        metric, num_bytes, num_pixels, num_channels = SegmentationMetric(len(dataset.classes)), 0, 0, 0
        student.eval()
        for index in range(len(dataset)):
            image, mask = dataset[index]
            stream = self.latents.encode(image, student.gate.choice)
            received = self.latents.receive(stream)
            metric.update(student.from_base(received).argmax(dim=1), mask[None])
            num_bytes, num_pixels = num_bytes + len(stream), num_pixels + mask.numel()
            num_channels += received.latents.shape[1]
        confusion = metric.confusion()
        return {
            **metric.results(),
            "constant_miou": constant_scores(confusion)["miou"],
            "bpp": 8 * num_bytes / num_pixels,
            "channels": num_channels / len(dataset),
            "images": len(dataset),
        }

    def training_images(self) -> Iterable[Tensor]:
        """Every training image (3, H, W) uint8, whole."""
        return (self.train_set[index][0] for index in range(len(self.train_set)))

    def _fit(
        self, model: nn.Module, loss_of: Step, epochs: int, stage: str, log: Callable[[str, int, float], None]
    ) -> list[float]:
        config, means = self.config, []
        batches = epochs_of_batches(len(self.train_set), config.batch_size, config.seed)
        optimizer = torch.optim.Adam(model.parameters(), lr=config.lr)
        per_epoch = len(self.train_set) // config.batch_size
        model.train()
        for epoch in range(epochs):
            total = 0.0
            optimizer.param_groups[0]["lr"] = learning_rate(config, epoch / epochs)
            for number in range(per_epoch):
                torch.manual_seed(config.seed + epoch * per_epoch + number)
                images, masks = (part.to(self.device) for part in self.crops.batch(self.train_set, next(batches)))
                with torch.autocast(self.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                    loss = loss_of(images, masks)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                total += float(loss.detach())
            means.append(total / per_epoch)
            log(stage, epoch + 1, means[-1])
        model.eval()
        return means

    def _frozen(self, teacher: DeepLab) -> DeepLab:
        return teacher.to(self.device).eval().requires_grad_(False)


def open_run(folder: Path) -> SegmentationRun:
    """A run that was trained (TaskError: not a run folder)."""
    if not (folder / "config.yaml").is_file():
        raise TaskError(f"{folder}: not a run of semantic segmentation (no config.yaml)")
    config = load_saved(SegmentationConfig, folder / "config.yaml")
    config.run = str(folder)
    return SegmentationRun(config)
