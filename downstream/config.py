"""Options of a fine-tune: the dataclass is the schema, recipes of the tasks' names hold the values."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING

from downstream.errors import TaskError

TASKS = ("classification",)
INPUTS = ("streams", "pixels")


@dataclass
class FinetuneConfig:
    """Everything that a fine-tune on the frozen codec depends on."""

    codec: str = MISSING  # exported codec: folder or hub id
    data: str = MISSING  # folder or URL (s3://, https://) with dataset.json and shards
    run: str = "runs/finetune"  # run folder; running again with the same one resumes
    task: str = "classification"
    input: str = "streams"  # or pixels: the same network on decoded pixels, to compare with
    anchor: str | None = None  # input=pixels: FORMAT:QUALITY, for example jpeg:30; none: pixels as they are
    rate: float | None = None  # input=streams: 0..1, of a codec with a range of rates; none: its best
    probe: bool = False  # train the linear head alone

    image_size: int | None = None  # pixels; that of the codec's pretraining where not given
    canvas_size: int | None = None
    epochs: int = 10
    batch_size: int = 64  # global, over all workers
    lr: float = 0.02
    weight_decay: float = 5e-4
    warmup: float = 0.05  # share of the run over which the learning rate rises
    label_smoothing: float = 0.1
    scale_min: float = 0.4  # least area of a training crop over that of the image
    seed: int = 0

    workers: int = 1
    launcher: str = "ray"
    precision: str = "bf16"
    num_workers: int = 0
    cache: str | None = None  # folder for the shards of a URL; $DICM_CACHE or the user's cache folder if not given
    cache_limit: float = 64.0  # GiB that they may take on a node
    log_every: int = 10
    checkpoint_every: int = 100
    keep_checkpoints: int = 2

    def validate(self) -> None:
        """Refuse what cannot work, before any work starts (TaskError)."""
        for key, valid in {
            "task": TASKS,
            "input": INPUTS,
            "launcher": ("ray", "local"),
            "precision": ("fp32", "bf16"),
        }.items():
            if (value := getattr(self, key)) not in valid:
                raise TaskError(f"{key}={value} is unknown; use one of {', '.join(valid)}")
        for key in ("epochs", "batch_size", "workers", "log_every", "checkpoint_every"):
            if getattr(self, key) < 1:
                raise TaskError(f"{key}={getattr(self, key)} is impossible; it must be at least 1")
        for key, low, high in (("label_smoothing", 0.0, 0.99), ("warmup", 0.0, 1.0), ("scale_min", 0.01, 1.0)):
            if not low <= getattr(self, key) <= high:
                raise TaskError(f"{key}={getattr(self, key):g} is impossible; it must lie in {low:g}..{high:g}")
        if self.cache_limit <= 0:
            raise TaskError(f"cache_limit={self.cache_limit:g} is impossible; give the cache some GiB")
        if self.lr <= 0:
            raise TaskError(f"lr={self.lr:g} is impossible; it must be positive")
        for key in ("image_size", "canvas_size"):
            if (value := getattr(self, key)) is not None and value < 32:
                raise TaskError(f"{key}={value} is impossible; it must be at least 32, the backbone's stride")
        if self.rate is not None and not (0 <= self.rate <= 1 and self.input == "streams"):
            raise TaskError(f"rate={self.rate:g} with input={self.input} is impossible; it lies in 0..1, for streams")
        if self.anchor == "none":  # YAML reads only `null` as nothing
            self.anchor = None
        if self.anchor is not None and self.input != "pixels":
            raise TaskError(f"anchor={self.anchor} needs input=pixels; the codec's own streams have no anchor")
        if self.anchor is not None:
            from downstream.evaluation.anchors import Anchor

            Anchor.parse(self.anchor)
