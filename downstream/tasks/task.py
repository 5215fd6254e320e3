"""What a task is to the launcher: data that it can use, networks on features, losses, and a measured result.

A run of `finetune` uses it like this, on every rank:

    found = Task.check_data(config, manifest)      before any worker starts
    task = Task(config, codec, runtime, found)
    for stage in config.stages(num_samples):       most tasks have one
        task.enter(stage)                          sets `model`, what this stage trains
        task.begin()                               at its step 0
        for batch in task.batches(samples_seen): task.loss(module, batch, generator)
        task.finish()
    task.evaluate()                                from real streams

`dicm predict` makes the same task without data, from the run's saved options and weights alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from timm.scheduler import CosineLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from cluster.runtime import Runtime
from data_pipeline.cache import ShardCache
from data_pipeline.manifest import Manifest
from data_pipeline.surveys import Survey
from downstream.config import FinetuneConfig, need_batches, need_splits
from downstream.errors import TaskError
from downstream.evaluation.anchors import create_anchor
from downstream.frozen import source_of
from pretrain.codec.backbone import HEAD_STRIDE, Backbone
from pretrain.codec.feature_codec import FeatureCodec
from pretrain.codec.precision import autocast
from pretrain.codec.pretrained import kept
from pretrain.feature_picture import feature_picture

C = TypeVar("C", bound=FinetuneConfig)
B = TypeVar("B")


@dataclass
class Found:
    """What a data set holds for a task.

    Attributes:
        num_samples: training samples that serve.
        left_out: what had to be left out or made good, reason -> count.
        details: what the task itself wants to keep of the check; plain values and arrays.
    """

    num_samples: int
    left_out: dict[str, int] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)


class Task(ABC, Generic[C, B]):
    """One rank's side of a task; `C` is its config, `B` its batches.

    Attributes:
        Config: options of the task.
        metrics: keys of the results that measure it, the one that curves show first, with their titles; shares 0..1,
            or None where there was nothing to measure.
        numbers: further keys of the results that tables show, with their titles.
        stage: what is trained now.
        source: images or streams in, features out.
        model: what is trained now; after the last stage, what evaluates and predicts.
    """

    Config: ClassVar[type[FinetuneConfig]]
    metrics: ClassVar[dict[str, str]]
    numbers: ClassVar[dict[str, str]] = {}
    source: Any
    model: nn.Module

    def __init__(self, config: C, codec: FeatureCodec | None, runtime: Runtime, found: Found | None = None):
        self.config, self.runtime, self.device = config, runtime, runtime.device
        self._found, self.codec, self.stage = found, codec, ""
        self.source = self.make_source()

    @property
    def found(self) -> Found:
        """What `check_data` found; only a task that predicts has none."""
        assert self._found is not None, "a task made without data was asked for some"
        return self._found

    @property
    def shard_cache(self) -> ShardCache:
        """The cache of the data set's shards, where it is at a URL."""
        return shard_cache_of(self.config)

    @classmethod
    def load_codec(cls, config: C, folder: str | None = None) -> FeatureCodec | None:
        """The frozen codec of a run, from `folder` where it has moved; None for a task that reads other latents."""
        return FeatureCodec.from_pretrained(folder or kept(str(config.codec), Path(config.run)))

    @classmethod
    def fill_in(cls, config: C, codec: FeatureCodec | None, manifest: Manifest) -> None:
        """Give options that were left open the values that codec and data set suggest; they are saved with the run.

        Raises:
            TaskError: an option that was given contradicts them.
        """
        names = cls.class_names(manifest)
        if config.classes and config.classes != names:
            raise TaskError(f"classes={config.classes[:5]} are not those of {config.data}; leave them out")
        config.classes = names

    @classmethod
    def check_codec(cls, config: C, codec: FeatureCodec | None) -> None:
        """See that the options fit the codec, before any work starts (TaskError)."""
        if config.rate is not None and codec is not None and not codec.config.rate_points > 1:
            raise TaskError(f"rate={config.rate:g}: this codec has one rate; leave it out")
        if config.anchor is not None:
            create_anchor(config.anchor, config.anchor_weights)

    @classmethod
    def class_names(cls, manifest: Manifest) -> list[str]:
        """Names of what the head tells apart."""
        return list(manifest.classes)

    @classmethod
    @abstractmethod
    def check_data(cls, config: C, manifest: Manifest) -> Found:
        """What the data set holds for the task, before any work starts (TaskError where it is of no use)."""

    def make_source(self) -> Any:
        """Where features come from, as the options say."""
        assert self.codec is not None
        config = self.config
        return source_of(self.codec, config.input, config.anchor, config.rate, self.device, config.anchor_weights)

    def enter(self, stage: str) -> None:
        """Make the network that a stage trains, as it is before the stage; equal on all ranks."""
        self.stage = stage
        torch.manual_seed(self.config.seed)
        self.model = self.network().to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    @property
    def backbone(self) -> Backbone:
        """The codec's."""
        assert self.codec is not None
        return self.codec.backbone

    @abstractmethod
    def network(self) -> nn.Module:
        """The network on features; what it takes of `backbone` it copies."""

    @abstractmethod
    def batches(self, samples_seen: int) -> Iterable[B]:
        """This rank's training batches without end, from position `samples_seen` of the order."""

    @abstractmethod
    def loss(self, module: Callable[..., Any], batch: B, generator: torch.Generator) -> tuple[Tensor, dict[str, Any]]:
        """Loss of a batch, and numbers to log (floats or tensors of one value, the same names at every step).

        Args:
            module: `model`, wrapped where gradients are averaged over ranks; call this one.
            generator: for all random draws; seeded by the step, so that a resumed run draws the same.
        """

    def begin(self) -> None:
        """What a stage does before its first step, unless it goes on with another run's network."""

    def start_from(self, state: dict[str, Any]) -> None:
        """Take over the network of another run of this task (TaskError where it is not of this one's shape)."""
        load_network(self.model, state, self.config.init)

    def finish(self) -> None:
        """What a stage does after its last step, before the checkpoint that ends it."""

    @abstractmethod
    def evaluate(self) -> dict[str, Any]:
        """`metrics`, `numbers`, `bpp`, `bpp_payload`, `images` and whatever else there is to tell, of `val_split`.

        From real streams, on all ranks together; each gets the same.
        """

    @abstractmethod
    def examples(self, count: int) -> list[Tensor]:
        """The first images (3, H, W) uint8 of `val_split`, as `evaluate` encodes them."""

    @property
    def num_views(self) -> int:
        """Views of each training image that cache=bitstreams encodes."""
        return self.config.cache_views

    @abstractmethod
    def view(self, number: int, view: int) -> tuple[Tensor, dict[str, Any]]:
        """A view of the `number`-th usable training sample, for cache=bitstreams.

        Returns:
            The image (3, H, W) uint8 that is encoded, and the fields that go with its stream into a WebDataset.

        Raises:
            SampleError: the sample cannot be used.
        """

    def stream_of(self, image: Tensor) -> bytes:
        """The stream or file of an image (3, H, W) uint8 that the task reads."""
        return self.source.encode(image)

    def receive_image(self, image: Tensor) -> tuple[Any, int]:
        """What `predict` takes, of an image (3, H, W) uint8 by way of a real stream, and the stream's bytes."""
        stream = self.stream_of(image)
        return self.receive_stream(stream)[0], len(stream)

    def receive_stream(self, stream: bytes) -> tuple[Any, int, int]:
        """What `predict` takes, of a stream, and height and width of its image (CodecError)."""
        return self.source.decode(stream)

    @abstractmethod
    def predict(self, received: Any, height: int, width: int) -> dict[str, Any]:
        """What the task tells of one image of height x width pixels, for JSON."""

    @abstractmethod
    def draw(self, picture: Tensor, prediction: dict[str, Any], score: float) -> Tensor:
        """A picture (3, H, W) uint8 with what was predicted, where it is surer than `score`."""

    def prepare(self, image: Tensor) -> Tensor:
        """The image (3, h, w) uint8 that is encoded, of one (3, H, W) that is to be predicted."""
        return image

    def picture(self, received: Any, height: int, width: int) -> Tensor:
        """A picture (3, height, width) uint8 of what was received, to draw on where there is no image."""
        return feature_picture(received[0].cpu(), HEAD_STRIDE)[:, :height, :width]

    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer of what is trained."""
        config = self.config
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        if config.optimizer == "sgd":
            return torch.optim.SGD(
                trained, lr=config.lr, momentum=0.9, weight_decay=config.weight_decay, nesterov=True, fused=True
            )
        kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
        return kind(trained, lr=config.lr, weight_decay=config.weight_decay, fused=True)

    def scheduler(self, optimizer: torch.optim.Optimizer, num_steps: int) -> Scheduler | None:
        """The learning rate over a stage; None leaves it as it is."""
        return CosineLRScheduler(
            optimizer,
            t_initial=num_steps,
            warmup_t=round(self.config.warmup * num_steps),
            warmup_lr_init=self.config.lr * 1e-2,
            warmup_prefix=True,
            t_in_epochs=False,
        )

    def autocast(self, enabled: bool = True) -> torch.autocast:
        """The run's precision, or float32."""
        return autocast(self.device, self.config.precision, enabled)


def survey_splits(
    config: FinetuneConfig,
    manifest: Manifest,
    survey: Callable[[str], Survey],
    *,
    what: str,
    remedy: str,
) -> Found:
    """What both splits hold for a task, its `details` the surveys by split.

    Args:
        survey: of a split by name.
        what: the task needs, in words.
        remedy: how to make a data set that has it.

    Raises:
        TaskError: a split is missing or holds nothing for the task; the batch is too large or too small.
    """
    need_splits(config, {name: split.num_samples for name, split in manifest.splits.items()}, remedy)
    surveys = {split: survey(split) for split in dict.fromkeys((config.train_split, config.val_split))}
    for split, one in surveys.items():
        if not one.found:
            reasons = "".join(f", {count} x {reason}" for reason, count in one.left_out.items())
            raise TaskError(
                f"{config.data}: no image of its {split} split has {what}{reasons}; {config.task} needs them, {remedy}"
            )
    num_samples = len(surveys[config.train_split].usable)
    need_batches(config, num_samples)
    left_out = {f"{split}: {name}": count for split, one in surveys.items() for name, count in one.left_out.items()}
    return Found(num_samples, left_out, details=surveys)


def load_network(model: nn.Module, state: dict[str, Any], init: str | None, optional: str | None = None) -> None:
    """Load the weights of the run `init` (TaskError where they do not fit).

    Args:
        optional: prefix of a part of `model` that keeps its weights where that run had none of it.
    """
    missing = [key for key in model.state_dict() if key not in state and optional and key.startswith(optional)]
    try:
        model.load_state_dict({**{key: model.state_dict()[key] for key in missing}, **state})
    except RuntimeError as error:
        lines = str(error).splitlines()
        raise TaskError(
            f"init={init} holds another network ({lines[min(1, len(lines) - 1)].strip()[:160]}); name a run of "
            "the same options"
        ) from error


def shard_cache_of(config: FinetuneConfig) -> ShardCache:
    """The cache of the data set's shards, where it is at a URL."""
    return ShardCache.of_size(config.shard_cache, config.shard_cache_limit)


def settle_statistics(network: nn.Module, inputs: Iterator[Tensor], runtime: Runtime) -> None:
    """Take the statistics of batch norms in `network` anew over `inputs`, averaged over ranks.

    Those that come with the backbone are of other features; running means of a short run still hold them.
    """
    update_bn(inputs, network)
    average_buffers(network, runtime)


def average_buffers(network: nn.Module, runtime: Runtime) -> None:
    """Give all ranks the mean of each rank's statistics: each has seen its own part of the last batch."""
    if runtime.world == 1:
        return
    for buffer in network.buffers():
        if buffer.is_floating_point():
            buffer.copy_(runtime.gather(buffer[None]).mean(dim=0))
