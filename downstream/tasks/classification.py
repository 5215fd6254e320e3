"""Classification: the backbone's tail and a linear head on f3 (N, C1, H/4, W/4)."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn

from data_pipeline.loader import CanvasBatch, CanvasDataset, CanvasLoader, collate, eval_loader, train_loader
from data_pipeline.manifest import Manifest
from data_pipeline.samples import seeded, training_loader
from data_pipeline.shards import ShardReader, facts_of
from data_pipeline.views import ViewConfig, center_images, random_crops, resample
from downstream.config import FinetuneConfig, need_batches, need_splits
from downstream.errors import TaskError
from downstream.evaluation.drawing import draw_caption
from downstream.frozen import RateMeter, pixel_input
from downstream.stream_cache import STREAM, StreamDataset
from downstream.tasks.task import Found, Task, load_network, settle_statistics, shard_cache_of
from pretrain.codec.backbone import Backbone
from pretrain.codec.feature_codec import FeatureCodec

EVALUATION_BATCH = 64
STATISTICS_SAMPLES = 2048  # training images that give the final statistics of batch norms
PROBE_STEPS, PROBE_LR = 300, 0.01
NUM_RANKED = 5
MOST_PIXELS = 4096  # a side
REMEDY = "build it with `dicm data build imagefolder SRC OUT --val-fraction 0.1`"


@dataclass
class ClassificationConfig(FinetuneConfig):
    """Options of a classification."""

    least_images: ClassVar[int] = 2  # the norm in front of the head

    task: str = "classification"
    probe: bool = False  # train the linear head alone, full batch, on features embedded once
    train_head: bool = False  # input=pixels: train stem and layer1 too, all of the network

    image_size: int | None = None  # pixels; that of the codec's pretraining where not given
    canvas_size: int | None = None
    label_smoothing: float = 0.1
    scale_min: float = 0.4  # least area of a training crop over that of the image

    def validate(self) -> None:
        """As `FinetuneConfig.validate`."""
        super().validate()
        if self.probe and self.cache != "none":
            raise TaskError(f"cache={self.cache} with probe=true is idle: a probe embeds each image once; leave it out")
        if self.train_head and (self.input != "pixels" or self.probe):
            raise TaskError(
                f"train_head=true with input={self.input} probe={str(self.probe).lower()} is impossible; stem and "
                "layer1 belong to the frozen codec, and only a network on pixels has its own"
            )
        self.within(0.0, 0.99, "label_smoothing")
        self.within(0.01, 1.0, "scale_min")
        for key in ("image_size", "canvas_size"):
            if (value := getattr(self, key)) is not None and not 32 <= value <= MOST_PIXELS:
                raise TaskError(f"{key}={value} is impossible; it must lie in 32..{MOST_PIXELS}")

    def stages(self, num_samples: int) -> dict[str, int]:
        """A probe has a fixed number of steps, none with epochs=0."""
        return {"probe": PROBE_STEPS if self.epochs else 0} if self.probe else super().stages(num_samples)


class Classifier(nn.Module):
    """Logits (N, num_classes) of f3; the tail starts as a copy of the pretrained one.

    Args:
        probe: train the head alone; the tail stays frozen, its batch norms on their running statistics.
        pixels: read normalised images by stem and layer1 of its own, copies at first, in place of f3.
    """

    def __init__(self, backbone: Backbone, num_classes: int, probe: bool, pixels: bool = False):
        super().__init__()
        self.front = copy.deepcopy(nn.Sequential(backbone.stem, backbone.layer1)) if pixels else None
        if self.front is not None:
            self.front.requires_grad_(True)
        self.tail = nn.Sequential(*(copy.deepcopy(getattr(backbone, f"layer{i}")) for i in (2, 3, 4)))
        self.tail.requires_grad_(not probe)
        self.probe = probe
        # Without affine parameters: it brings features of any codec to one scale, so one learning rate fits all.
        self.norm = nn.BatchNorm1d(backbone.num_features, affine=False)
        self.head = nn.Linear(backbone.num_features, num_classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def train(self, mode: bool = True) -> Classifier:
        """Training mode of what is trained."""
        super().train(mode)
        if self.probe:
            self.tail.eval()
        return self

    def pooled(self, f3: Tensor) -> Tensor:
        """(N, num_features) of f3, before norm and head."""
        return self.tail(f3 if self.front is None else self.front(f3)).mean(dim=(2, 3))

    def forward(self, features: Tensor) -> Tensor:
        """Logits of f3, or of (N, num_features) that are pooled and normalised already."""
        return self.head(features if features.ndim == 2 else self.norm(self.pooled(features).float()))

    def loss(self, logits: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
        """Cross-entropy, float32."""
        return F.cross_entropy(logits.float(), labels, label_smoothing=label_smoothing)


class Classification(Task[ClassificationConfig, Any]):
    """Classification of whole images; a batch is canvases, or with `probe` features and labels."""

    Config = ClassificationConfig
    metrics = {"top1": "top-1", "top5": "top-5"}  # noqa: RUF012
    model: Classifier

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self._canvases: CanvasDataset | None = None

    @classmethod
    def fill_in(cls, config: ClassificationConfig, codec: FeatureCodec | None, manifest: Manifest) -> None:
        """Sizes are those of the codec's pretraining."""
        super().fill_in(config, codec, manifest)
        assert codec is not None
        config.image_size = config.image_size or codec.extra.get("image_size", 224)
        config.canvas_size = config.canvas_size or codec.extra.get("canvas_size", config.image_size)

    @classmethod
    def check_data(cls, config: ClassificationConfig, manifest: Manifest) -> Found:
        """Number of training samples; TaskError where the data set lacks labels or a split."""
        need_splits(config, {name: split.num_samples for name, split in manifest.splits.items()}, REMEDY)
        reader = ShardReader(config.data, manifest.split(config.train_split), shard_cache_of(config))
        first = facts_of(reader.read(0))
        if not manifest.classes or first.get("label") is None:
            raise TaskError(f"{config.data} has no labels; classification needs class folders in the source")
        num_samples = manifest.split(config.train_split).num_samples
        need_batches(config, num_samples)
        return Found(num_samples)

    def network(self) -> Classifier:
        return Classifier(self.backbone, len(self.config.classes), self.config.probe, self.config.train_head)

    def make_source(self) -> Any:
        """With `train_head` the network reads pixels."""
        config = self.config
        if not config.train_head:
            return super().make_source()
        return pixel_input(nn.Identity(), config.anchor, config.anchor_weights, self.device)

    def start_from(self, state: dict[str, Any]) -> None:
        """Stem and layer1 stay the codec's where that run read features."""
        load_network(self.model, state, self.config.init, optional="front.")

    @property
    def _image_size(self) -> int:
        assert self.config.image_size is not None
        return self.config.image_size

    @property
    def _canvas_size(self) -> int:
        assert self.config.canvas_size is not None
        return self.config.canvas_size

    def batches(self, samples_seen: int) -> Iterator[Any]:
        """Canvases, or streams of crops; with `probe` the features of all training images, again and again."""
        config, runtime = self.config, self.runtime
        if config.probe:
            return self._embedded()
        if config.cache == "none":
            return iter(self._training_loader(samples_seen, config.num_workers))
        return iter(
            training_loader(
                StreamDataset.of_task(self), batch_size=config.batch_size, rank=runtime.rank, world=runtime.world,
                num_workers=config.num_workers, seed=config.seed, samples_seen=samples_seen, quarantine=config.run,
            )
        )  # fmt: skip

    def view(self, number: int, view: int) -> tuple[Tensor, dict[str, Any]]:
        """A crop, as a training draws it."""
        if self._canvases is None:
            self._canvases = CanvasDataset(
                self.config.data, self.config.train_split, self._canvas_size, self.shard_cache
            )
        batch = collate([self._canvases[number]])
        generator = torch.Generator(self.device)
        generator.manual_seed(seeded(self.config.seed, view * self.found.num_samples + number))
        return self._views(batch, generator)[0], {"json": {"label": int(self._labels(batch)[0])}}

    def _training_loader(self, samples_seen: int = 0, num_workers: int = 0) -> CanvasLoader:
        return train_loader(
            self.config.data,
            self.config.train_split,
            canvas_size=self._canvas_size,
            batch_size=self.config.batch_size,
            rank=self.runtime.rank,
            world=self.runtime.world,
            num_workers=num_workers,
            seed=self.config.seed,
            samples_seen=samples_seen,
            cache=self.shard_cache,
            quarantine=self.config.run,
        )

    def loss(
        self, module: Callable[[Tensor], Tensor], batch: Any, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Any]]:
        """Cross-entropy, and accuracy on the batch."""
        if isinstance(batch, CanvasBatch):
            views, labels = self._views(batch, generator), self._labels(batch)
            logits = module(self.source.features(views))
            loss = self.model.loss(logits, labels, self.config.label_smoothing)
        elif isinstance(batch, list):
            labels = torch.tensor([facts_of(sample)["label"] for sample in batch], device=self.device)
            logits = module(torch.stack(self.source.decode_all([sample[STREAM] for sample in batch])))
            loss = self.model.loss(logits, labels, self.config.label_smoothing)
        else:
            inputs, labels = batch
            with self.autocast(False):
                logits = module(inputs)
                loss = self.model.loss(logits, labels, 0.0)
        return loss, {"train_top1": count_correct(logits.detach(), labels)[0] / len(labels)}

    def optimizer(self) -> torch.optim.Optimizer:
        """A probe is a convex problem of little data: Adam, at one rate."""
        if self.config.probe:
            return torch.optim.Adam(self.model.head.parameters(), lr=PROBE_LR, weight_decay=1e-4)
        return super().optimizer()

    def scheduler(self, optimizer: torch.optim.Optimizer, num_steps: int) -> Scheduler | None:
        return None if self.config.probe else super().scheduler(optimizer, num_steps)

    def _views(self, batch: CanvasBatch, generator: torch.Generator) -> Tensor:
        """Random crops, half of them mirrored, (N, 3, S, S) uint8: what a camera would have sent."""
        canvas, aspect = batch.canvas.to(self.device), batch.aspect.to(self.device)
        crops = random_crops(aspect, ViewConfig(scale_min=self.config.scale_min), generator)
        flip = torch.rand(len(canvas), generator=generator, device=self.device) < 0.5
        return resample(canvas, crops, self._image_size, flip).mul_(255).round_().to(torch.uint8)

    def _labels(self, batch: CanvasBatch) -> Tensor:
        """Labels (N,) on the device; TaskError where an image has none, or one that the data set does not name."""
        bad = (batch.label < 0) | (batch.label >= len(self.config.classes))
        if bool(bad.any()):
            index, label = int(batch.index[bad][0]), int(batch.label[bad][0])
            has = "has no label" if label < 0 else f"has label {label}, there are {len(self.config.classes)} classes"
            raise TaskError(f"{self.config.data}: image {index} {has}; build the data set again without it")
        return batch.label.to(self.device)

    @torch.no_grad()
    def _embedded(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Pooled, normalised features and labels of the training images of all ranks."""
        self.model.eval()
        pooled, labels = [], []
        num_samples = self.found.num_samples
        for batch in self._evaluation_batches(self.config.train_split, num_samples - num_samples % self.runtime.world):
            with self.autocast():
                f3 = self.source.features(self._centers(batch))
                pooled.append(self.model.pooled(f3).float())
            labels.append(self._labels(batch))
        features, targets = self.runtime.gather(torch.cat(pooled)), self.runtime.gather(torch.cat(labels))
        self.model.norm.train()
        self.model.norm.momentum = None  # one pass gives the exact statistics
        self.model.norm.reset_running_stats()
        self.model.norm(features)
        self.model.norm.eval()
        inputs = self.model.norm(features)
        return itertools.repeat((inputs, targets))

    def finish(self) -> None:
        """Batch-norm statistics anew, over training images as they are evaluated."""
        if self.config.probe:
            return
        samples = min(STATISTICS_SAMPLES, self.found.num_samples)
        batches = itertools.islice(self._training_loader(), max(1, samples // self.config.batch_size))
        with self.autocast():
            features = (self.source.features(self._centers(batch)) for batch in batches)
            settle_statistics(self.model, features, self.runtime)

    @torch.no_grad()
    def evaluate(self) -> dict[str, Any]:
        """Accuracies and rates."""
        self.model.eval()
        correct, rates = torch.zeros(2, dtype=torch.float64), RateMeter()
        for batch in self._evaluation_batches(self.config.val_split, None):
            f3, sizes, payloads = self.source.through_streams(self._centers(batch))
            with self.autocast():
                logits = self.model(f3)
            correct += count_correct(logits, self._labels(batch)).cpu()
            rates.add(sizes, payloads, self._image_size, self._image_size)
        measured = rates.rates(self.runtime)
        top1, top5 = self.runtime.gather(correct[None].to(self.device)).sum(0).tolist()
        return {"top1": top1 / measured["images"], "top5": top5 / measured["images"], **measured}

    def examples(self, count: int) -> list[Tensor]:
        return list(self._centers(next(iter(self._evaluation_batches(self.config.val_split, count)))))

    def _evaluation_batches(self, split: str, limit: int | None) -> CanvasLoader:
        return eval_loader(
            self.config.data,
            split,
            canvas_size=self._canvas_size,
            batch_size=EVALUATION_BATCH,
            rank=self.runtime.rank,
            world=self.runtime.world,
            limit=limit,
            cache=self.shard_cache,
            quarantine=self.config.run,
        )

    def _centers(self, batch: CanvasBatch) -> Tensor:
        return center_images(batch.canvas, batch.aspect, self._image_size)

    def prepare(self, image: Tensor) -> Tensor:
        """The middle of the image, as in evaluation."""
        size = (self._canvas_size, self._canvas_size)
        canvas = F.interpolate(image[None], size=size, mode="bilinear", antialias=True)
        aspect = torch.tensor([image.shape[-1] / image.shape[-2]])
        return center_images(canvas, aspect, self._image_size)[0]

    @torch.no_grad()
    def predict(self, received: Tensor, height: int, width: int) -> dict[str, Any]:
        """`classes`: the five likeliest, each with `class`, `label` and `score`."""
        self.model.eval()
        with self.autocast():
            logits = self.model(received)
        scores, labels = logits.float().softmax(dim=1)[0].topk(min(NUM_RANKED, logits.shape[1]))
        ranked = zip(labels.tolist(), scores.tolist(), strict=True)
        return {"classes": [{"class": self.config.classes[k], "label": k, "score": score} for k, score in ranked]}

    def draw(self, picture: Tensor, prediction: dict[str, Any], score: float) -> Tensor:
        """The likeliest class as a caption."""
        best = prediction["classes"][0]
        return draw_caption(picture, f"{best['class']} {best['score']:.2f}")


def count_correct(logits: Tensor, labels: Tensor) -> Tensor:
    """(2,): how many labels (N,) are the best, and among the five best, of logits (N, classes)."""
    ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices
    hits = ranked == labels[:, None]
    return torch.stack([hits[:, 0].sum(), hits.any(dim=1).sum()]).float()
