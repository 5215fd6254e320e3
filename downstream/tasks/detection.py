"""Detection: Faster R-CNN on f3, measured by COCO's mean average precision and VOC's.

Images keep their sizes; what is learned from is what the frozen codec makes of each image, mirrored or not.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torchvision.io import encode_png

from data_pipeline.manifest import Manifest
from data_pipeline.objects import (
    ObjectDataset,
    Objects,
    ObjectSample,
    facts_from,
    mirror,
    read_objects,
    shrink_image,
    survey_objects,
)
from data_pipeline.samples import (
    SampleDataset,
    SampleLoader,
    once,
    picture_of,
    to_tensor,
    training_loader,
)
from data_pipeline.shards import facts_of
from data_pipeline.sources.annotations import encode_mask
from downstream.errors import TaskError
from downstream.evaluation.drawing import draw_objects
from downstream.evaluation.objects import coco_metrics, voc_ap50
from downstream.frozen import PixelInput, RateMeter, features_of
from downstream.grouping import in_groups
from downstream.latent_config import LatentConfig
from downstream.stream_cache import STREAM, StreamDataset
from downstream.tasks.latent_input import LatentInput, gate_of, synthesis_of
from downstream.tasks.latent_task import LatentTask, num_channels
from downstream.tasks.rcnn import COARSEST, NUM_LEVELS, Detector, GatedDetector
from downstream.tasks.task import Found, settle_statistics, shard_cache_of, survey_splits

S = TypeVar("S")
STATISTICS_BATCH, STATISTICS_SAMPLES = 16, 128  # training images that give batch norms their statistics
DECIMALS = 2  # of a pixel and of a score's per cent, in predictions


@dataclass
class DetectionConfig(LatentConfig):
    """Options of a detection. The widths are torchvision's; small machines and data want less.

    With `gate`, chosen channels of latents are read in place of f3 (Liu, section 3.7).
    """

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
        if self.gate is not None and self.input == "pixels":
            raise TaskError(f"gate={self.gate} with input=pixels is impossible; a gate chooses channels of latents")
        self.at_least(1, "fpn_channels", "hidden", "proposals", "rois")
        if self.max_side is not None and self.max_side < COARSEST:
            raise TaskError(f"max_side={self.max_side} is impossible; it must be at least {COARSEST}, P6's stride")
        if len(self.anchors) != NUM_LEVELS or min(self.anchors) < 1:
            raise TaskError(
                f"anchors={self.anchors} are impossible; give {NUM_LEVELS} sides in pixels, "
                "for example anchors=[32,64,128,256,512]"
            )


class Example(NamedTuple):
    """What is learned from an image; one that was encoded before comes as a stream, its pixels only where needed."""

    sample: ObjectSample
    stream: bytes | None


class Detection(LatentTask[DetectionConfig, list[Example]]):
    """Boxes and classes of objects."""

    Config = DetectionConfig
    metrics = {  # noqa: RUF012
        "map": "mAP", "map_50": "AP50", "map_75": "AP75", "map_small": "small", "map_medium": "medium",
        "map_large": "large", "voc_ap50": "VOC AP50",
    }  # fmt: skip
    masks = False  # whether instances are outlined
    remedy = "build it with `dicm data build voc SRC OUT` or `dicm data build coco SRC OUT`"
    model: Detector | GatedDetector

    @classmethod
    def check_data(cls, config: DetectionConfig, manifest: Manifest) -> Found:
        """Surveys of both splits; TaskError where one is missing or has no objects."""
        what, cache, count = "boxes and masks" if cls.masks else "boxes", shard_cache_of(config), len(manifest.classes)
        if not manifest.classes:
            raise TaskError(f"{config.data} names no classes; {config.task} needs {what} with classes, {cls.remedy}")
        return survey_splits(
            config, manifest, lambda split: survey_objects(config.data, split, count, cls.masks, cache),
            what=what, remedy=cls.remedy,
        )  # fmt: skip

    def network(self) -> Detector | GatedDetector:
        config = self.config
        detector = Detector(
            self.backbone, len(config.classes), channels=config.fpn_channels, hidden=config.hidden,
            anchors=config.anchors, proposals=config.proposals, rois=config.rois, masks=self.masks,
        )  # fmt: skip
        if config.gate is None:
            return detector
        gate, synthesis = gate_of(config, self.source.channels), synthesis_of(config, self.codec)
        front = LatentInput(gate, config.transform, self.backbone.channels, synthesis)
        return GatedDetector(front, detector)

    def begin(self) -> None:
        """Statistics of batch norms, which then stay: from features of training images, cut to one size.

        Behind a gate these are f1, which the transform learns to give.
        """
        model, source, train_set = self.model, self.source, self.dataset(self.config.train_split)
        if isinstance(model, GatedDetector):
            source = PixelInput(self.head, None, self.device)
            self.choose_varied(sample.image for sample in once(train_set))
        batches = self._loader(train_set, STATISTICS_BATCH * self.runtime.world, num_workers=0)
        samples = min(STATISTICS_SAMPLES, self.found.num_samples)
        pyramid = model.detector.pyramid if isinstance(model, GatedDetector) else model.pyramid
        with torch.no_grad(), self.autocast():
            chosen = itertools.islice(batches, max(1, samples // (STATISTICS_BATCH * self.runtime.world)))
            self.model.eval()
            features = (_cut(features_of(source, [sample.image.to(self.device) for sample in b])) for b in chosen)
            settle_statistics(pyramid, features, self.runtime)

    @property
    def head(self) -> Callable[[Tensor], Tensor]:
        """f1 of normalised images, by the frozen backbone: what F is compared with."""
        return self.backbone.to(self.device).eval().requires_grad_(False).head

    def batches(self, samples_seen: int) -> Iterator[list[Example]]:
        config = self.config
        if config.cache == "none":
            train_set = self.dataset(config.train_split)
            for samples in self._loader(train_set, config.batch_size, config.num_workers, samples_seen):
                yield [Example(sample, None) for sample in samples]
        else:
            streams = StreamDataset.of_task(self)
            for raw in self._loader(streams, config.batch_size, config.num_workers, samples_seen):
                yield [self._of_stream(sample) for sample in raw]

    def _loader(
        self, dataset: SampleDataset[S], batch_size: int, num_workers: int, samples_seen: int = 0
    ) -> SampleLoader[S]:
        runtime = self.runtime
        return training_loader(
            dataset, batch_size=batch_size, rank=runtime.rank, world=runtime.world, num_workers=num_workers,
            seed=self.config.seed, samples_seen=samples_seen, quarantine=self.config.run,
        )  # fmt: skip

    def dataset(self, split: str) -> ObjectDataset:
        """The usable samples of a split."""
        config, usable = self.config, self.found.details[split].usable
        return ObjectDataset(
            config.data, split, usable, len(config.classes), self.masks, config.max_side, self.shard_cache
        )

    @property
    def num_views(self) -> int:
        """The image, and the image mirrored."""
        return 2 if self.config.flip else 1

    def view(self, number: int, view: int) -> tuple[Tensor, dict[str, Any]]:
        """The image or its mirror image; pixels go along where the loss compares with their features."""
        sample = self._train_set[number]
        if view:
            sample = mirror(sample)
        height, width = _size(sample.image)
        fields: dict[str, Any] = {"json": facts_from(sample.objects, width, height)}
        if self.config.distils:
            fields["png"] = encode_png(sample.image.contiguous(), 1).numpy().tobytes()
        return sample.image, fields

    @cached_property
    def _train_set(self) -> ObjectDataset:
        """Kept for `view`: a new reader would hash its shards anew for every sample."""
        return self.dataset(self.config.train_split)

    def _of_stream(self, raw: dict[str, Any]) -> Example:
        facts = facts_of(raw)
        objects, _ = read_objects(facts, facts["width"], facts["height"], len(self.config.classes), self.masks)
        image = torch.empty(3, facts["height"], facts["width"], dtype=torch.uint8, device="meta")
        if "png" in raw:
            image = to_tensor(picture_of(raw))
        return Example(ObjectSample(image, objects, -1, raw["__key__"]), raw[STREAM])

    def loss(
        self, module: Callable[..., dict[str, Tensor]], batch: list[Example], generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Any]]:
        """Sum of torchvision's losses and, behind a gate, of the distance between F and f1; and each."""
        samples = [example.sample for example in batch]
        streams = [example.stream for example in batch if example.stream is not None]
        if self.config.flip and not streams:
            flips = (torch.rand(len(batch), generator=generator, device=self.device) < 0.5).tolist()
            samples = [mirror(sample) if flip else sample for sample, flip in zip(samples, flips, strict=True)]
        images, sizes = [sample.image for sample in samples], [_size(sample.image) for sample in samples]
        targets = [self._target(sample) for sample in samples]
        if self.config.gate is None:
            features = self.source.decode_all(streams) if streams else features_of(self.source, images)
            losses = module(features, sizes, targets)
        else:
            y_hats = self.source.decode_all(streams) or in_groups(
                images, _size, lambda group: list(self.source.latents(torch.stack(group)))
            )
            guides = features_of(PixelInput(self.head, None, self.device), images) if self.config.distils else None
            losses = module(y_hats, sizes, targets, guides)
            if guides is not None:
                losses["feature_mse"] = self.config.feature_weight * losses["feature_mse"]
        return torch.stack(list(losses.values())).sum(), {name: loss.detach() for name, loss in losses.items()}

    def _target(self, sample: ObjectSample) -> dict[str, Tensor]:
        """What is learned of an image; crowds and difficult objects are not."""
        objects = sample.objects
        chosen = ~objects.ignored
        target = {"boxes": objects.boxes[chosen], "labels": objects.labels[chosen]}
        if objects.masks is not None:
            target["masks"] = objects.masks[chosen]
        return {name: value.to(self.device) for name, value in target.items()}

    def examples(self, count: int) -> list[Tensor]:
        return [sample.image for sample in itertools.islice(once(self.dataset(self.config.val_split)), count)]

    @torch.no_grad()
    def evaluate(self) -> dict[str, Any]:
        """Average precisions and rates, image by image: a result does not depend on what stands beside it."""
        self.model.eval()
        rates, lines = RateMeter(), []
        dataset, runtime = self.dataset(self.config.val_split), self.runtime
        for sample in once(dataset, rank=runtime.rank, world=runtime.world, quarantine=self.config.run):
            height, width = _size(sample.image)
            received, size, payload = self.through_stream(sample.image)
            rates.add_one(size, payload, height, width, num_channels(received))
            record = {
                "image": sample.index, "height": height, "width": width,
                "truth": truth_of(sample.objects), "found": self._find(received, height, width),
            }  # fmt: skip
            lines.append(json.dumps(record))
        return {**self.measure(self._gathered(lines)), **rates.rates(runtime)}

    def measure(self, records: list[dict[str, Any]]) -> dict[str, Any]:
        """Metrics of the records of all images."""
        num_classes = len(self.config.classes)
        return {**coco_metrics(records, num_classes), "voc_ap50": voc_ap50(records, num_classes, self.config.voc07)}

    def _gathered(self, lines: list[str]) -> list[dict[str, Any]]:
        """Records of all ranks, in the order of the data set."""
        data = np.frombuffer("".join(line + "\n" for line in lines).encode(), dtype=np.uint8)
        text = self.runtime.gather(torch.from_numpy(data.copy()).to(self.device)).cpu().numpy().tobytes().decode()
        return sorted((json.loads(line) for line in text.splitlines()), key=lambda record: record["image"])

    def _find(self, received: Any, height: int, width: int) -> dict[str, Any]:
        """Detections of one image, plain values."""
        with self.autocast():
            if isinstance(self.model, GatedDetector):
                found = self.model.from_base(received)
            else:
                (found,) = self.model(list(received), [(height, width)])
        values = {name: found[name].tolist() for name in ("boxes", "labels", "scores")}
        if "masks" in found:
            values["masks"] = [encode_mask(mask) for mask in found["masks"].cpu().numpy()]
        return values

    @torch.no_grad()
    def predict(self, received: Any, height: int, width: int) -> dict[str, Any]:
        """`objects`: each with `class`, `label`, `score`, `box` in pixels and, where masks are predicted, `mask`."""
        self.model.eval()
        found = self._find(received, height, width)
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
