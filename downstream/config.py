"""Options that all fine-tunes share: the dataclass is the schema, recipes of the tasks' names hold the values.

Each task adds its own in a subclass, in its module.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import ClassVar

from omegaconf import MISSING

from cluster.options import ClusterConfig
from cluster.runtime import under_torchrun
from downstream.errors import TaskError
from pretrain.codec.config import PRECISIONS

INPUTS = ("streams", "pixels")
OPTIMIZERS = ("sgd", "adamw", "adam")
CACHES = ("none", "bitstreams")
# Options on which no result depends; a run may go on with others.
FREE_KEYS = {
    "run", "workers", "launcher", "cluster", "num_workers", "shard_cache", "shard_cache_limit", "log_every",
    "checkpoint_every", "keep_checkpoints", "keep_every", "micro_batch",
}  # fmt: skip


@dataclass
class FinetuneConfig:
    """Everything that a fine-tune of any task on the frozen codec depends on.

    Attributes:
        least_images: that a step, or a part of one, needs; 2 where a batch norm sees one value of each image, and one
            image alone has no variance.
    """

    least_images: ClassVar[int] = 1

    codec: str | None = MISSING  # exported codec: folder or hub id; null for a task that reads other latents
    data: str = MISSING  # folder or URL (s3://, https://) with dataset.json and shards
    train_split: str = "train"
    val_split: str = "val"  # what results are measured on
    run: str = "runs/finetune"  # run folder; running again with the same one resumes
    task: str = MISSING
    input: str = "streams"  # or pixels: the same network on decoded pixels, to compare with
    anchor: str | None = None  # input=pixels: NAME:QUALITY[@SCALE], for example jpeg:30; none: pixels as they are
    anchor_weights: str = "zoo"  # of an anchor of CompressAI's: zoo, or a file
    rate: float | None = None  # input=streams: 0..1, of a codec with a range of rates; none: its best
    classes: list[str] = field(default_factory=list)  # names of what the head tells apart; those of the data set
    init: str | None = None  # run folder of a complete fine-tune of this task, whose network is gone on with

    epochs: int = 10  # 0 with init: nothing is trained, its network is measured on this input
    batch_size: int = 64  # global, over all workers
    optimizer: str = "sgd"  # with Nesterov's momentum; or adamw
    lr: float = 0.02
    weight_decay: float = 5e-4
    warmup: float = 0.05  # share of the run over which the learning rate rises
    seed: int = 0

    workers: int = 1
    launcher: str = "ray"
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    precision: str = "bf16"  # of the networks, where the device computes in it; else, and with fp32, float32
    num_workers: int = 0
    cache: str = "none"  # or bitstreams: encode the training set once, then train from its streams
    cache_views: int = 4  # cache=bitstreams: random views of each image that are encoded, taken in turn
    cache_folder: str | None = None  # where the streams are kept, for other runs too; RUN/streams if not given
    shard_cache: str | None = None  # folder for shards of a URL; $DICM_CACHE or the user's cache folder if not given
    shard_cache_limit: float = 64.0  # GiB that they may take on a node
    log_every: int = 10
    checkpoint_every: int = 100
    checkpoints: str | None = None  # where they are kept: a folder or URL (s3://); RUN/checkpoints if not given
    keep_checkpoints: int = 2  # of the newest
    keep_every: int = 0  # steps; besides the newest, one checkpoint in so many is kept
    micro_batch: int | None = None  # most images that a worker has in memory; a greater share is cut into equal parts

    def validate(self) -> None:
        """Refuse what cannot work, before any work starts (TaskError)."""
        for key, valid in {
            "input": INPUTS,
            "optimizer": OPTIMIZERS,
            "launcher": ("ray", "local"),
            "precision": PRECISIONS,
            "cache": CACHES,
        }.items():
            if (value := getattr(self, key)) not in valid:
                raise TaskError(f"{key}={value} is unknown; use one of {', '.join(valid)}")
        if self.codec is None and self.needs_codec():
            raise TaskError(f"codec is missing; {self.task} reads a codec's features, name its folder: codec=DIR")
        for option in fields(self):
            value = getattr(self, option.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise TaskError(f"{option.name}={value} is impossible; it must be a finite number")
        if self.seed >= 2**63:
            raise TaskError(f"seed={self.seed} is impossible; it must be below 2^63")
        self.at_least(0 if self.init else 1, "epochs")
        self.at_least(1, "batch_size", "workers", "log_every", "checkpoint_every", "keep_checkpoints")
        self.cluster.validate(self.workers)
        self.at_least(1, "cache_views")
        self.at_least(0, "num_workers", "seed", "weight_decay", "keep_every")
        if self.micro_batch is not None:
            self.at_least(self.least_images, "micro_batch")
        self.within(0.0, 1.0, "warmup")
        if self.shard_cache_limit <= 0:
            raise TaskError(f"shard_cache_limit={self.shard_cache_limit:g} is impossible; give the cache some GiB")
        if self.lr <= 0:
            raise TaskError(f"lr={self.lr:g} is impossible; it must be positive")
        if self.rate is not None and not (0 <= self.rate <= 1 and self.input == "streams"):
            raise TaskError(f"rate={self.rate:g} with input={self.input} is impossible; it lies in 0..1, for streams")
        if self.anchor == "none":  # YAML reads only `null` as nothing
            self.anchor = None
        if self.anchor is not None and self.input != "pixels":
            raise TaskError(f"anchor={self.anchor} needs input=pixels; the codec's own streams have no anchor")
        if self.anchor is not None:
            from downstream.evaluation.anchors import check_anchor

            check_anchor(self.anchor)

    @property
    def keep_best(self) -> bool:
        """What a fine-tune is worth is measured at its end."""
        return False

    def needs_codec(self) -> bool:
        """Whether features are those of an exported codec."""
        return True

    def stages(self, num_samples: int) -> dict[str, int]:
        """What is trained, one after the other: name -> optimizer steps, with `num_samples` training samples."""
        return {"finetune": self.epochs * (num_samples // self.batch_size)}

    def at_least(self, least: int, *keys: str) -> None:
        """TaskError for the first of `keys` whose value is below `least`."""
        for key in keys:
            if getattr(self, key) < least:
                raise TaskError(f"{key}={getattr(self, key)} is impossible; it must be at least {least}")

    def within(self, low: float, high: float, *keys: str) -> None:
        """TaskError for the first of `keys` whose value is outside low..high."""
        for key in keys:
            if not low <= getattr(self, key) <= high:
                raise TaskError(f"{key}={getattr(self, key):g} is impossible; it must lie in {low:g}..{high:g}")


def need_splits(config: FinetuneConfig, num_samples: dict[str, int], remedy: str) -> None:
    """See that the splits for training and validation are there and hold samples (TaskError).

    Args:
        num_samples: of each split that the data set has.
        remedy: how to make the missing one.
    """
    for key in ("train_split", "val_split"):
        split = getattr(config, key)
        if split not in num_samples:
            raise TaskError(
                f"{config.data} has no {split} split, it has {_listed(list(num_samples))}; name one with {key}=NAME, "
                f"or {remedy}"
            )
        if num_samples[split] == 0:
            raise TaskError(f"{config.data}: its {split} split is empty; build the data set again with more images")


def need_batches(config: FinetuneConfig, num_samples: int) -> None:
    """See that a batch fits between the workers and the training samples (TaskError)."""
    workers = int(os.environ["WORLD_SIZE"]) if config.launcher == "local" and under_torchrun() else config.workers
    least = workers * config.least_images
    if not least <= config.batch_size <= num_samples:
        raise TaskError(
            f"batch_size={config.batch_size} must lie in {least}..{num_samples} for "
            f"{workers} worker(s) and the {num_samples} training samples of {config.data}"
        )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"
