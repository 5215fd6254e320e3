"""Options of a pretraining run: dataclasses are the schema, the recipes beside this file hold the values.

`PretrainConfig` is what `dicm pretrain RECIPE key=value ...` resolves to and what is saved as `config.yaml` in
the run folder. Weights and schedules of the four stages are those of DICM where the recipe says so.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from cluster.options import ClusterConfig
from data_pipeline.views import ViewConfig
from pretrain.codec.config import PRECISIONS, CodecConfig
from pretrain.errors import ConfigError
from pretrain.ssl.config import SSLConfig

PARTS = ("backbone", "redundancy", "compression")
OPTIMIZERS = ("sgd", "adam", "adamw")
LAUNCHERS = ("ray", "local")


@dataclass
class StageConfig:
    """One stage: what it trains and the weights of its loss.

    `contrast * SSL + rate * bpp + distortion * |f| + sum_k features[k] * MSE(layer k)`. What `rate` and
    `distortion` measure follows from the deepest part that is trained: y1 and L1(f1, f2) for the redundancy
    elimination, y2 + z and MSE(f2, f3) for the compression network.
    """

    name: str = MISSING
    trains: list[str] = field(default_factory=list)  # of PARTS
    epochs: float = 1.0
    batch_size: int = 256  # global, over all workers
    image_size: int | None = None  # pixels of a view, where it differs from the run's
    contrast: float = 0.0
    rate: float = 0.0
    distortion: float = 0.0
    features: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])  # layer2, layer3, layer4
    relative: bool = False  # divide each distortion by the mean magnitude (L1) or square (MSE) of its target
    rates: list[float] = field(default_factory=list)  # rate weights at codec.rate_points rates, instead of `rate`
    balance: float = 0.4  # the loss at each of these rates counts weight^-balance as much
    klt: bool = True  # transforms and a hyperprior that start fresh begin as the Karhunen-Loeve transform of f2
    target_bpp: float | None = None  # the rate weight follows by dual ascent until bpp holds this value
    dual_rate: float = 0.02  # step size of that ascent, on the weight's logarithm
    optimizer: str = "sgd"
    lr: float = 0.03
    lr_fan_in: float = 0.0  # adam, adamw: weights that read more inputs learn as much more slowly; 0: all alike
    weight_decay: float = 0.0
    warmup: float = 0.0  # share of the stage over which the learning rate rises linearly
    cosine: bool = True  # decay to zero along half a cosine; otherwise constant
    clip: float = 0.0  # gradient norm; 0 leaves gradients alone


@dataclass
class PretrainConfig:
    """Everything a pretraining run depends on."""

    data: str = MISSING  # folder or URL (s3://, https://) with dataset.json and shards
    run: str = "runs/pretrain"  # run folder; running again with the same one resumes
    init: str | None = None  # exported codec (folder or hub id) to start from
    init_parts: list[str] = field(default_factory=lambda: list(PARTS))  # what is taken from it; the rest starts fresh
    split: str = "train"
    image_size: int = 224  # pixels of a view
    canvas_size: int = 256  # pixels of the square to which an image is decoded
    seed: int = 0

    workers: int = 1
    launcher: str = "ray"
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    precision: str = "bf16"  # of the networks, where the device computes in it; else, and with fp32, float32
    channels_last: bool = True
    compile: bool = False
    accumulate: int = 1  # micro-batches a step
    micro_batch: int | None = None  # most images that a worker has in memory; a greater share is cut into more of them
    shard_optimizer: bool = False  # fairscale OSS: each rank keeps its share of the optimizer's state
    activation_checkpointing: bool = False  # fairscale: recompute residual stages in the backward pass
    num_workers: int = 0  # decoding processes a worker
    shuffle_shards: int = 16
    num_lanes: int = 128
    shard_cache: str | None = None  # folder for shards of a URL; $DICM_CACHE or the user's cache folder if not given
    shard_cache_limit: float = 64.0  # GiB that they may take on a node

    codec: CodecConfig = field(default_factory=CodecConfig)
    ssl: SSLConfig = field(default_factory=SSLConfig)
    views: ViewConfig = field(default_factory=ViewConfig)
    stages: list[StageConfig] = field(default_factory=list)
    only: list[str] = field(default_factory=list)  # names of the stages to run; empty: all

    log_every: int = 10  # steps
    picture_every: int = 200  # steps between pictures of heatmaps, boxes and crops
    checkpoint_every: int = 200  # steps; also at the end of every stage
    checkpoints: str | None = None  # where they are kept: a folder or URL (s3://); RUN/checkpoints if not given
    keep_checkpoints: int = 2  # of the newest
    keep_every: int = 0  # steps; besides the newest, one checkpoint in so many is kept
    keep_best: bool = False  # besides, the one with the best kNN accuracy
    knn_every: float = 0.0  # epochs between kNN evaluations; 0: at the end of every stage alone
    knn_samples: int = 10_000  # training samples in the kNN's bank; 0 turns the evaluation off

    def num_micro_batches(self, share: int) -> int:
        """Into how many parts a worker cuts its share of a batch, of so many images."""
        needed = -(-share // self.micro_batch) if self.micro_batch else 1
        return min(max(self.accumulate, needed), max(share // 2, 1))

    def validate(self) -> None:
        """Refuse what cannot work, before any work starts (ConfigError)."""
        self.codec.validate()
        self.ssl.validate()
        self.views.validate()
        _one_of("launcher", self.launcher, LAUNCHERS)
        _one_of("precision", self.precision, PRECISIONS)
        for key in (
            "workers", "accumulate", "image_size", "canvas_size", "log_every", "checkpoint_every", "keep_checkpoints",
        ):  # fmt: skip
            if getattr(self, key) < 1:
                raise ConfigError(f"{key}={getattr(self, key)} is impossible; it must be at least 1")
        self.cluster.validate(self.workers)
        for part in self.init_parts:
            _one_of("init_parts", part, PARTS)
        if self.shard_cache_limit <= 0:
            raise ConfigError(f"shard_cache_limit={self.shard_cache_limit:g} is impossible; give the cache some GiB")
        _image_size("image_size", self.image_size)
        if self.micro_batch is not None and self.micro_batch < 2:
            raise ConfigError(f"micro_batch={self.micro_batch} is impossible; batch norm needs at least 2 images")
        if self.keep_every < 0:
            raise ConfigError(f"keep_every={self.keep_every} is impossible; it must be at least 0")
        if self.activation_checkpointing and self.workers > 1 and (self.accumulate > 1 or self.micro_batch is not None):
            # DDP learns its static graph (see Stage) in the first backward pass, which cannot be a partial one.
            raise ConfigError(
                f"activation_checkpointing=true with accumulate={self.accumulate} micro_batch={self.micro_batch} works "
                f"with one worker alone, this is workers={self.workers}; leave both out: recomputation already saves "
                "what micro-batches would"
            )
        if not self.stages:
            raise ConfigError("stages is empty; choose a recipe that names at least one stage")
        names = [stage.name for stage in self.stages]
        for name in self.only:
            _one_of("only", name, tuple(names))
        if self.only:
            self.stages = [stage for stage in self.stages if stage.name in self.only]
        if len(set(names)) < len(names):
            raise ConfigError(f"stages has a name twice: {', '.join(names)}; give each its own")
        for stage in self.stages:
            _validate_stage(stage, self)


def _validate_stage(stage: StageConfig, config: PretrainConfig) -> None:
    key = f"stages.{stage.name}"
    for part in stage.trains:
        _one_of(f"{key}.trains", part, PARTS)
    if not stage.trains:
        raise ConfigError(f"{key}.trains is empty; name at least one of {', '.join(PARTS)}")
    if "redundancy" in stage.trains and not config.codec.redundancy:
        raise ConfigError(
            f"{key}.trains={stage.trains} with codec.redundancy=false: there is no RE to train; choose the others "
            "with only=[...]"
        )
    if "compression" in stage.trains and len(stage.trains) > 1:
        raise ConfigError(f"{key}.trains={stage.trains}: the compression network is trained alone")
    if ("backbone" in stage.trains) != (stage.contrast > 0):
        raise ConfigError(
            f"{key}.contrast={stage.contrast:g} with trains={stage.trains}: "
            "the backbone learns from the contrastive loss and nothing else does"
        )
    _one_of(f"{key}.optimizer", stage.optimizer, OPTIMIZERS)
    if stage.lr_fan_in < 0 or (stage.lr_fan_in and stage.optimizer == "sgd"):
        raise ConfigError(
            f"{key}.lr_fan_in={stage.lr_fan_in:g} with optimizer={stage.optimizer}: it is a number of inputs, for "
            "adam and adamw; 0 leaves it out"
        )
    if stage.image_size is not None:
        _image_size(f"{key}.image_size", stage.image_size)
    if stage.epochs <= 0:
        raise ConfigError(f"{key}.epochs={stage.epochs:g} is impossible; leave the stage out to skip it")
    share = config.workers * config.accumulate
    if stage.batch_size < 2 * share:
        raise ConfigError(
            f"{key}.batch_size={stage.batch_size} leaves less than two images for each of {config.workers} "
            f"worker(s) x {config.accumulate} micro-batch(es); use at least {2 * share}"
        )
    if len(stage.features) != 3:
        raise ConfigError(f"{key}.features={stage.features} needs three weights: layer2, layer3, layer4")
    points = config.codec.rate_points
    if "compression" in stage.trains and len(stage.rates) != (points if points > 1 else 0):
        raise ConfigError(
            f"{key}.rates={stage.rates} has {len(stage.rates)} weights for codec.rate_points={points}; "
            "give one for each point, heaviest first, and none to a codec of one rate"
        )
    if stage.rates and (min(stage.rates) <= 0 or stage.target_bpp is not None or "compression" not in stage.trains):
        raise ConfigError(
            f"{key}.rates={stage.rates}: weights must be positive, and they are for the compression network alone and "
            "exclude target_bpp"
        )
    if not 0 <= stage.balance <= 1:
        raise ConfigError(
            f"{key}.balance={stage.balance:g} must lie in 0..1, from the plain sum to one of losses over their weights"
        )
    if stage.target_bpp is not None and (stage.target_bpp <= 0 or stage.rate <= 0):
        raise ConfigError(
            f"{key}.target_bpp={stage.target_bpp:g} needs a positive target and a positive rate weight to "
            f"start from (rate={stage.rate:g})"
        )


def _one_of(key: str, value: str, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise ConfigError(f"{key}={value} is unknown; use one of {', '.join(valid)}")


def _image_size(key: str, value: int) -> None:
    if value < 32 or value % 32:
        raise ConfigError(f"{key}={value} is not a positive multiple of 32, the backbone's stride")
