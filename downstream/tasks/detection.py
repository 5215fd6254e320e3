"""Detection: Faster R-CNN on f3, measured by COCO's mean average precision and VOC's.

Images keep their sizes; what is learned from is what the frozen codec makes of each image, mirrored or not.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_pipeline.objects import (
    ObjectDataset,
    ObjectLoader,
    Objects,
    ObjectSample,
    object_loader,
    once,
    shrink_image,
    survey,
)
from data_pipeline.shards import Manifest
from data_pipeline.sources.annotations import encode_mask
from downstream.config import FinetuneConfig, need_batches, need_splits
from downstream.errors import TaskError
from downstream.evaluation.drawing import draw_objects
from downstream.evaluation.objects import coco_metrics, voc_ap50
from downstream.frozen import RateMeter, features_of
from downstream.tasks.rcnn import COARSEST, NUM_LEVELS, Detector
from downstream.tasks.task import Found, Task, settle_statistics
from pretrain.codec.backbone import Backbone

STATISTICS_BATCH, STATISTICS_SAMPLES = 16, 128  # training images that give batch norms their statistics
DECIMALS = 2  # of a pixel and of a score's per cent, in predictions


@dataclass
class DetectionConfig(FinetuneConfig):
    """Options of a detection. The widths are torchvision's; small machines and data want less."""

    task: str = "detection"
    batch_size: int = 16
    fpn_channels: int = 256
    hidden: int = 1024  # of the box head
    anchors: list[int] = field(default_factory=lambda: [32, 64, 128, 256, 512])  # pixels, of P2 to P6
    proposals: int = 1000
    rois: int = 512  # proposals an image that the box head is trained on
    flip: bool = True  # mirror half of the training images, before they are encoded
    max_side: int | None = None  # pixels; larger images are shrunk to this before all else; none: they keep their size
    voc07: bool = False  # VOC's AP50 by the eleven-point rule of 2007

    def validate(self) -> None:
        """As `FinetuneConfig.validate`."""
        super().validate()
        self.at_least(1, "fpn_channels", "hidden", "proposals", "rois")
        if self.max_side is not None and self.max_side < COARSEST:
            raise TaskError(f"max_side={self.max_side} is impossible; it must be at least {COARSEST}, P6's stride")
        if len(self.anchors) != NUM_LEVELS or min(self.anchors) < 1:
            raise TaskError(
                f"anchors={self.anchors} are impossible; give {NUM_LEVELS} sides in pixels, "
                "for example anchors=[32,64,128,256,512]"
            )


class Detection(Task[DetectionConfig, list[ObjectSample]]):
    """Boxes and classes of objects."""

    Config = DetectionConfig
    metrics = {  # noqa: RUF012
        "map": "mAP", "map_50": "AP50", "map_75": "AP75", "map_small": "small", "map_medium": "medium",
        "map_large": "large", "voc_ap50": "VOC AP50",
    }  # fmt: skip
    masks = False  # whether instances are outlined
    remedy = "build it with `dicm data build voc SRC OUT` or `dicm data build coco SRC OUT`"
    model: Detector

    @classmethod
    def check_data(cls, config: DetectionConfig, manifest: Manifest) -> Found:
        """Surveys of both splits; TaskError where one is missing or has no objects."""
        need_splits(config, {name: split.num_samples for name, split in manifest.splits.items()}, cls.remedy)
        what = "boxes and masks" if cls.masks else "boxes"
        if not manifest.classes:
            raise TaskError(f"{config.data} names no classes; {config.task} needs {what} with classes, {cls.remedy}")
        surveys = {split: survey(config.data, split, len(manifest.classes), cls.masks) for split in ("train", "val")}
        for split, found in surveys.items():
            if not found.num_objects:
                raise TaskError(
                    f"{config.data}: no image of its {split} split has {what}{_reasons(found.left_out)}; "
                    f"{config.task} needs them, {cls.remedy}"
                )
        num_samples = len(surveys["train"].usable)
        need_batches(config, num_samples, per_worker=1)
        left_out = {
            f"{split}: {reason}": count for split, found in surveys.items() for reason, count in found.left_out.items()
        }
        return Found(num_samples, left_out, details=surveys)

    def network(self, backbone: Backbone) -> Detector:
        config = self.config
        return Detector(
            backbone, len(config.classes), channels=config.fpn_channels, hidden=config.hidden, anchors=config.anchors,
            proposals=config.proposals, rois=config.rois, masks=self.masks,
        )  # fmt: skip

    def begin(self) -> None:
        """Statistics of batch norms, which then stay: from features of training images, cut to one size."""
        batches = self._loader(STATISTICS_BATCH * self.runtime.world, num_workers=0)
        samples = min(STATISTICS_SAMPLES, self.found.num_samples)
        with torch.no_grad(), self.autocast():
            chosen = itertools.islice(batches, max(1, samples // (STATISTICS_BATCH * self.runtime.world)))
            self.model.eval()
            features = (_cut(features_of(self.source, self._images(batch))) for batch in chosen)
            settle_statistics(self.model.pyramid, features, self.runtime)

    def batches(self, samples_seen: int) -> Iterator[list[ObjectSample]]:
        return iter(self._loader(self.config.batch_size, self.config.num_workers, samples_seen))

    def _loader(self, batch_size: int, num_workers: int, samples_seen: int = 0) -> ObjectLoader:
        runtime = self.runtime
        return object_loader(
            self.dataset("train"), batch_size=batch_size, rank=runtime.rank, world=runtime.world,
            num_workers=num_workers, seed=self.config.seed, samples_seen=samples_seen,
        )  # fmt: skip

    def dataset(self, split: str) -> ObjectDataset:
        """The usable samples of a split."""
        config, found = self.config, self.found.details[split]
        return ObjectDataset(config.data, split, found, len(config.classes), self.masks, config.max_side)

    def _images(self, batch: Sequence[ObjectSample]) -> list[Tensor]:
        return [sample.image.to(self.device) for sample in batch]

    def loss(
        self, module: Callable[..., dict[str, Tensor]], batch: list[ObjectSample], generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Any]]:
        """Sum of torchvision's losses, and each."""
        flips = [False] * len(batch)
        if self.config.flip:
            flips = (torch.rand(len(batch), generator=generator, device=self.device) < 0.5).tolist()
        images = [image.flip(-1) if flip else image for image, flip in zip(self._images(batch), flips, strict=True)]
        targets = [self._target(sample, flip) for sample, flip in zip(batch, flips, strict=True)]
        losses = module(features_of(self.source, images), [_size(image) for image in images], targets)
        return torch.stack(list(losses.values())).sum(), {name: loss.detach() for name, loss in losses.items()}

    def _target(self, sample: ObjectSample, flip: bool) -> dict[str, Tensor]:
        """What is learned of an image; crowds and difficult objects are not."""
        objects, width = sample.objects, sample.image.shape[-1]
        chosen = ~objects.ignored
        boxes = objects.boxes[chosen]
        if flip:
            boxes = torch.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], dim=1)
        target = {"boxes": boxes, "labels": objects.labels[chosen]}
        if objects.masks is not None:
            masks = objects.masks[chosen]
            target["masks"] = masks.flip(-1) if flip else masks
        return {name: value.to(self.device) for name, value in target.items()}

    @torch.no_grad()
    def evaluate(self) -> dict[str, Any]:
        """Average precisions and rates, image by image: a result does not depend on what stands beside it."""
        self.model.eval()
        rates, lines = RateMeter(), []
        for (sample,) in once(self.dataset("val"), rank=self.runtime.rank, world=self.runtime.world):
            height, width = _size(sample.image)
            features, sizes, payloads = self.source.through_streams(sample.image[None].to(self.device))
            rates.add(sizes, payloads, height, width)
            record = {
                "image": sample.index, "height": height, "width": width,
                "truth": truth_of(sample.objects), "found": self._find(features, height, width),
            }  # fmt: skip
            lines.append(json.dumps(record))
        return {**self.measure(self._gathered(lines)), **rates.rates(self.runtime)}

    def measure(self, records: list[dict[str, Any]]) -> dict[str, Any]:
        """Metrics of the records of all images."""
        num_classes = len(self.config.classes)
        return {**coco_metrics(records, num_classes), "voc_ap50": voc_ap50(records, num_classes, self.config.voc07)}

    def _gathered(self, lines: list[str]) -> list[dict[str, Any]]:
        """Records of all ranks, in the order of the data set."""
        data = np.frombuffer("".join(line + "\n" for line in lines).encode(), dtype=np.uint8)
        text = self.runtime.gather(torch.from_numpy(data.copy()).to(self.device)).cpu().numpy().tobytes().decode()
        return sorted((json.loads(line) for line in text.splitlines()), key=lambda record: record["image"])

    def _find(self, features: Tensor, height: int, width: int) -> dict[str, Any]:
        """Detections of one image, plain values."""
        with self.autocast():
            (found,) = self.model(list(features), [(height, width)])
        values = {name: found[name].tolist() for name in ("boxes", "labels", "scores")}
        if "masks" in found:
            values["masks"] = [encode_mask(mask) for mask in found["masks"].cpu().numpy()]
        return values

    @torch.no_grad()
    def predict(self, features: Tensor, height: int, width: int) -> dict[str, Any]:
        """`objects`: each with `class`, `label`, `score`, `box` in pixels and, where masks are predicted, `mask`."""
        self.model.eval()
        found = self._find(features, height, width)
        names = self.config.classes
        objects = [
            {"class": names[label], "label": label, "score": score, "box": [round(side, DECIMALS) for side in box]}
            for box, label, score in zip(found["boxes"], found["labels"], found["scores"], strict=True)
        ]
        for item, mask in zip(objects, found.get("masks", ()), strict=False):
            item["mask"] = mask
        return {"objects": objects}

    def prepare(self, image: Tensor) -> Tensor:
        """The image itself, or shrunk as those of the data set were."""
        return shrink_image(image, self.config.max_side)

    def draw(self, picture: Tensor, prediction: dict[str, Any], score: float) -> Tensor:
        """Boxes with names and scores, and masks."""
        return draw_objects(picture, prediction["objects"], score)


def truth_of(objects: Objects) -> dict[str, Any]:
    """The objects of an image as `downstream.evaluation.objects` has them."""
    truth = {
        "boxes": objects.boxes.tolist(), "labels": objects.labels.tolist(), "ignored": objects.ignored.tolist(),
        "areas": objects.areas.tolist(),
    }  # fmt: skip
    if objects.masks is not None:
        truth["masks"] = [encode_mask(mask) for mask in objects.masks.numpy()]
    return truth


def _cut(features: list[Tensor]) -> Tensor:
    """(N, C, h, w): the upper left corners of features, as large as all have it; no padding enters statistics."""
    height, width = (min(one.shape[axis] for one in features) for axis in (-2, -1))
    return torch.stack([one[:, :height, :width] for one in features])


def _size(image: Tensor) -> tuple[int, int]:
    return image.shape[-2], image.shape[-1]


def _reasons(left_out: dict[str, int]) -> str:
    return "".join(f", {count} x {reason}" for reason, count in left_out.items())
