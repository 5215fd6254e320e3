"""Semantic segmentation of gated latents: latent -> gate -> transform -> DeepLabv3 without stem and layer1.

    x -> frozen codec -> y_hat -> gate -> transform -> F -> layer2..4 -> ASPP -> logits       (student)
    x -> frozen stem and layer1 of a DeepLabv3 that was trained on raw images -> F_gt         (teacher)

Loss: cross-entropy + 1.0 * MSE(F, F_gt). Adam, 1e-3, then 1e-4 after three quarters of the epochs. The metric is mean
IoU over the classes that occur, in the truth or the prediction; pixels of class 255 count nowhere. A run trains its
teacher first, into RUN/teacher.pt, unless `teacher` names one; with `transform_epochs`, gate and transform next, into
RUN/transform.pt, on the second term of the loss alone. With input=pixels the whole DeepLabv3 is trained on decoded
pixels, to compare with.

Source: Liu, Sun, Katto 2022, sections 2 and 3.1.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from timm.scheduler import MultiStepLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn
from torchvision.transforms import v2

from data_pipeline.decoding import decode_image, decode_indexes
from data_pipeline.manifest import Manifest
from data_pipeline.masks import MaskDataset, TrainingCrops, survey_masks
from data_pipeline.samples import once, training_loader
from data_pipeline.sources.annotations import encode_mask
from data_pipeline.views import normalize
from downstream.errors import TaskError
from downstream.evaluation.drawing import draw_regions
from downstream.evaluation.segmentation import SegmentationMetric, class_scores, constant_scores, scores
from downstream.files import write_file
from downstream.frozen import RateMeter, pixel_input
from downstream.stream_cache import STREAM, StreamDataset
from downstream.tasks.deeplab import DeepLab, load_deeplab
from downstream.tasks.latent_input import LatentInput, feature_distance, gate_of, synthesis_of
from downstream.tasks.latent_task import LatentTask, num_channels
from downstream.tasks.segmentation_config import SegmentationConfig
from downstream.tasks.segmentation_network import SegmentationNetwork, segmentation_loss
from downstream.tasks.task import Found, shard_cache_of, survey_splits
from pretrain.codec.feature_codec import FeatureCodec

TEACHER, TRANSFORM = "teacher.pt", "transform.pt"
REMEDY = "build it with `dicm data build cityscapes SRC OUT` or `dicm data build voc SRC OUT`"
DROP = 0.1  # of the learning rate


class MaskBatch(NamedTuple):
    """What a step learns from."""

    images: Tensor | None  # (N, 3, H, W) uint8; None where streams are read and no pixel is needed
    masks: Tensor  # (N, H, W) int64
    streams: list[bytes] | None  # cache=bitstreams


class SemanticSegmentation(LatentTask[SegmentationConfig, MaskBatch]):
    """A class for each pixel."""

    Config = SegmentationConfig
    metrics = {"miou": "mIoU", "pixel_accuracy": "pixel accuracy"}  # noqa: RUF012
    model: SegmentationNetwork | LatentInput | DeepLab

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self._teacher_head: Callable[[Tensor], Tensor] | None = None

    @classmethod
    def load_codec(cls, config: SegmentationConfig, folder: str | None = None) -> FeatureCodec | None:
        """None for latents of another model, where `codec` does not name one to start from."""
        return super().load_codec(config, folder) if config.codec is not None or folder is not None else None

    @classmethod
    def fill_in(cls, config: SegmentationConfig, codec: FeatureCodec | None, manifest: Manifest) -> None:
        """The network's ResNet is the codec's."""
        super().fill_in(config, codec, manifest)
        config.backbone = config.backbone or (codec.config.backbone if codec is not None else "resnet50")

    @classmethod
    def class_names(cls, manifest: Manifest) -> list[str]:
        return list(manifest.mask_names)

    @classmethod
    def check_data(cls, config: SegmentationConfig, manifest: Manifest) -> Found:
        """Surveys of both splits; TaskError where one is missing or has no masks."""
        cache = shard_cache_of(config)
        return survey_splits(
            config, manifest, lambda split: survey_masks(config.data, split, len(config.classes), cache),
            what="a semantic mask", remedy=REMEDY,
        )  # fmt: skip

    @classmethod
    def check_codec(cls, config: SegmentationConfig, codec: FeatureCodec | None) -> None:
        """A backbone that fits the codec's, a teacher that can be read; and as `LatentTask`."""
        super().check_codec(config, codec)
        assert config.backbone is not None
        if config.start == "codec" and codec is not None and config.backbone != codec.config.backbone:
            raise TaskError(
                f"backbone={config.backbone} is not the codec's, {codec.config.backbone}, whose weights it should "
                "start from; leave it out, or set start=random"
            )
        if config.transform == "synthesis" and codec is not None and config.backbone != codec.config.backbone:
            raise TaskError(
                f"transform=synthesis gives features of the codec's backbone, {codec.config.backbone}, which "
                f"backbone={config.backbone} cannot read; leave it out, or use transform=deconv"
            )
        if config.teacher is not None:
            load_deeplab(Path(config.teacher), config.backbone, len(config.classes))

    def make_source(self) -> Any:
        """With input=pixels the whole network reads pixels."""
        config = self.config
        if config.input == "streams":
            return super().make_source()
        return pixel_input(nn.Identity(), config.anchor, config.anchor_weights, self.device)

    def network(self) -> nn.Module:
        """What the stage trains; a student's tail and a static gate's channels come in `begin`."""
        deeplab = self._new_deeplab()
        if self.stage in ("teacher", "pixels"):
            return deeplab
        gate, synthesis = gate_of(self.config, self.source.channels), synthesis_of(self.config, self.codec)
        if self.stage == "transform":
            return LatentInput(gate, self.config.transform, deeplab.channels, synthesis)
        return SegmentationNetwork(gate, self.config.transform, deeplab, synthesis)

    def _new_deeplab(self) -> DeepLab:
        assert self.config.backbone is not None
        return DeepLab(self.config.backbone, len(self.config.classes))

    def begin(self) -> None:
        """Start from the codec's ResNet (teacher), or from the teacher and a transform that was trained (student)."""
        config = self.config
        if isinstance(self.model, LatentInput):
            self.choose_varied(sample.image for sample in once(self.dataset(config.train_split)))
            return
        if isinstance(self.model, DeepLab) and (self.stage == "teacher" or config.teacher is None):
            if config.start == "codec" and self.codec is not None:
                self.model.start_from(self.codec.backbone)
            return
        teacher = self._load_teacher()
        if isinstance(self.model, DeepLab):
            self.model.load_state_dict(teacher.state_dict())
            return
        self.model.tail.load_state_dict(teacher.tail.state_dict())
        if config.begins_with_transform:
            path = Path(config.run) / TRANSFORM
            try:
                self.model.input.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
            except OSError as error:
                raise TaskError(f"{path}: cannot be read ({error.strerror}); start a new run") from error
        else:
            self.choose_varied(sample.image for sample in once(self.dataset(config.train_split)))

    def _load_teacher(self) -> DeepLab:
        assert self.config.backbone is not None
        path = Path(self.config.teacher or Path(self.config.run) / TEACHER)
        return load_deeplab(path, self.config.backbone, len(self.config.classes))

    @property
    def teacher_head(self) -> Callable[[Tensor], Tensor]:
        """F_gt (N, C1, H/4, W/4) of normalised images, by the frozen stem and layer1 of the teacher."""
        if self._teacher_head is None:
            teacher = self._load_teacher().eval().requires_grad_(False)
            self._teacher_head = teacher.to(self.device, memory_format=torch.channels_last).head  # type: ignore[call-overload]
        return self._teacher_head

    def finish(self) -> None:
        """Keep a trained transform, and a trained teacher, for other runs too; a network on clean pixels can be one."""
        if self.stage == "transform":
            self._keep(TRANSFORM)
        elif self.stage == "teacher" or (self.stage == "pixels" and self.config.anchor is None):
            self._keep(TEACHER)
        self.runtime.barrier()

    def _keep(self, name: str) -> None:
        """Write the weights into the run folder (TaskError where that is not possible)."""
        if self.runtime.rank:
            return
        buffer = io.BytesIO()
        torch.save({key: tensor.cpu() for key, tensor in self.model.state_dict().items()}, buffer)
        write_file(Path(self.config.run) / name, buffer.getvalue())

    def dataset(self, split: str) -> MaskDataset:
        """The usable samples of a split; those for training as crops."""
        config = self.config
        crops = TrainingCrops((config.height, config.width), (config.scale_min, config.scale_max))
        return MaskDataset(
            config.data, split, self.found.details[split].usable, len(config.classes), config.short_side,
            crops if split == config.train_split else None, config.seed, self.shard_cache,
        )  # fmt: skip

    def batches(self, samples_seen: int) -> Iterator[MaskBatch]:
        config, runtime = self.config, self.runtime
        options: dict[str, Any] = {
            "batch_size": config.batch_size, "rank": runtime.rank, "world": runtime.world, "seed": config.seed,
            "num_workers": config.num_workers, "samples_seen": samples_seen, "quarantine": config.run,
        }  # fmt: skip
        if config.cache == "bitstreams" and self.stage != "teacher":
            for samples in training_loader(StreamDataset.of_task(self), **options):
                yield self._of_streams(samples)
        else:
            for crops in training_loader(self.dataset(config.train_split), **options):
                images = torch.stack([crop.image for crop in crops]).to(self.device)
                yield MaskBatch(images, torch.stack([crop.mask for crop in crops]).long().to(self.device), None)

    def view(self, number: int, view: int) -> tuple[Tensor, dict[str, Any]]:
        """A crop, as a training draws it; the pixels go along, where the loss compares with the teacher's features."""
        dataset = self._train_set
        position = view * len(dataset) + number
        crop = dataset.load(dataset.raw(number, None), int(dataset.usable[number]), position)
        fields: dict[str, Any] = {"mask.png": _png(crop.mask.numpy())}
        if self.config.distils:
            fields["png"] = _png(crop.image.permute(1, 2, 0).numpy()[..., ::-1])
        return crop.image, fields

    @cached_property
    def _train_set(self) -> MaskDataset:
        """Kept for `view`: a new reader would hash its shards anew for every sample."""
        return self.dataset(self.config.train_split)

    def _of_streams(self, samples: list[dict[str, Any]]) -> MaskBatch:
        images = None
        if self.config.distils:
            pixels = [decode_image(sample["png"]) for sample in samples]
            images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).to(self.device)
        masks = np.stack([decode_indexes(sample["mask.png"]) for sample in samples])
        streams = [sample[STREAM] for sample in samples]
        return MaskBatch(images, torch.from_numpy(masks).long().to(self.device), streams)

    def loss(
        self, module: Callable[..., Any], batch: MaskBatch, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Any]]:
        """L = cross-entropy + feature_weight * MSE(F, F_gt) (Liu, equations 1 to 3); of DeepLabv3s the first alone.

        Of a transform by itself, MSE(F, F_gt).
        """
        config = self.config
        if self.stage == "teacher":
            assert batch.images is not None
            cross_entropy = segmentation_loss(module(normalize(batch.images.float() / 255)), batch.masks)
            return cross_entropy, {"cross_entropy": cross_entropy.detach()}
        if self.stage == "pixels":
            pixels = torch.stack(self.source.decode_all(batch.streams)) if batch.streams else None
            pixels = self.source.features(batch.images) if pixels is None else pixels
            cross_entropy = segmentation_loss(module(pixels), batch.masks)
            return cross_entropy, {"cross_entropy": cross_entropy.detach()}
        if batch.streams is not None:
            y_hat = torch.stack(self.source.decode_all(batch.streams))
        else:
            y_hat = self.source.latents(batch.images)
        if self.stage == "transform":
            distance = self._distance(module(y_hat, *batch.masks.shape[-2:]), batch)
            return distance, {"feature_mse": distance.detach()}
        logits, features = module(y_hat, *batch.masks.shape[-2:])
        cross_entropy = segmentation_loss(logits, batch.masks)
        figures = {"cross_entropy": cross_entropy.detach()}
        if not config.distils:
            return cross_entropy, figures
        distance = self._distance(features, batch)
        return cross_entropy + config.feature_weight * distance, {**figures, "feature_mse": distance.detach()}

    def _distance(self, features: Tensor, batch: MaskBatch) -> Tensor:
        """MSE(F, F_gt) of a batch with its images."""
        assert batch.images is not None
        with torch.no_grad():
            target = self.teacher_head(normalize(batch.images.float() / 255))
        return feature_distance(features, target)

    def scheduler(self, optimizer: torch.optim.Optimizer, num_steps: int) -> Scheduler:
        """A tenth of the rate after `drop_at`."""
        drop = round(self.config.drop_at * num_steps)
        return MultiStepLRScheduler(optimizer, decay_t=[drop], decay_rate=DROP, t_in_epochs=False)

    def examples(self, count: int) -> list[Tensor]:
        return [sample.image for sample in itertools.islice(once(self.dataset(self.config.val_split)), count)]

    @torch.no_grad()
    def evaluate(self) -> dict[str, Any]:
        """mIoU and rate from real streams that carry the chosen channels and their list, nothing else."""
        self.model.eval()
        metric, rates = SegmentationMetric(len(self.config.classes)), RateMeter()
        dataset, runtime = self.dataset(self.config.val_split), self.runtime
        for sample in once(dataset, rank=runtime.rank, world=runtime.world, quarantine=self.config.run):
            height, width = sample.mask.shape
            received, size, payload = self.through_stream(sample.image)
            metric.update(self._logits(received, height, width).argmax(dim=1), sample.mask[None])
            rates.add_one(size, payload, height, width, num_channels(received))
        confusion = runtime.gather(metric.confusion()[None].to(self.device)).sum(0).cpu()
        return {
            **scores(confusion),
            "class_iou": dict(zip(self.config.classes, class_scores(confusion), strict=True)),
            "constant_miou": constant_scores(confusion)["miou"],
            "channels": None,  # of pixels
            **rates.rates(runtime),
        }

    def _logits(self, received: Any, height: int, width: int) -> Tensor:
        with self.autocast():
            if isinstance(self.model, SegmentationNetwork):
                return self.model.from_base(received)
            return self.model(received).float()

    def prepare(self, image: Tensor) -> Tensor:
        """The image itself, or resized as those of the data set were."""
        side = self.config.short_side
        return image if side is None else v2.functional.resize(image, [side], antialias=True)

    @torch.no_grad()
    def predict(self, received: Any, height: int, width: int) -> dict[str, Any]:
        """`regions`: each class that occurs with `class`, `label`, `share` of the pixels and `mask` (COCO RLE)."""
        self.model.eval()
        labels = self._logits(received, height, width).argmax(dim=1)[0].cpu()
        counts = labels.flatten().bincount(minlength=len(self.config.classes)).tolist()
        return {
            "regions": [
                {
                    "class": name, "label": label, "share": count / labels.numel(),
                    "mask": encode_mask((labels == label).numpy().astype(np.uint8)),
                }
                for label, (name, count) in enumerate(zip(self.config.classes, counts, strict=True))
                if count
            ]
        }  # fmt: skip

    def draw(self, picture: Tensor, prediction: dict[str, Any], score: float) -> Tensor:
        """A colour for each class, and a legend."""
        return draw_regions(picture, prediction["regions"])


def _png(pixels: np.ndarray) -> bytes:
    """PNG of (H, W) or, in OpenCV's order, (H, W, 3)."""
    return cv2.imencode(".png", pixels, [cv2.IMWRITE_PNG_COMPRESSION, 1])[1].tobytes()
