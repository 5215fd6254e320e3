from __future__ import annotations

import pytest

from pretrain.run import RECIPES, resolve

DATA = ["data=somewhere"]


@pytest.mark.parametrize("recipe", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_resolve__every_shipped_recipe_is_valid(recipe: str):
    config = resolve(recipe, DATA)
    assert config.stages


def test_resolve__authors_values():
    config = resolve("dicm_resnet50", DATA)
    stages = {stage.name: stage for stage in config.stages}
    assert [(s.epochs, s.batch_size) for s in config.stages] == [(800, 256), (20, 64), (200, 256), (20, 32)]
    assert (stages["redundancy"].rate, stages["redundancy"].distortion) == (1, 128)
    assert (stages["joint"].rate, stages["joint"].distortion) == (0.1, 0.1)
    assert (stages["codec"].rate, stages["codec"].distortion) == (0.08, 2048)
    assert stages["codec"].features == [384, 256, 192]
    assert (config.codec.re_latent, config.codec.latent_channels, config.codec.z_channels) == (192, 192, 192)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("launcher=slurm", ["launcher", "slurm", "local"]),
        ("precision=fp8", ["precision", "fp8", "bf16"]),
        ("image_size=50", ["image_size", "50", "32"]),
        ("workers=0", ["workers", "0"]),
        ("shard_cache_limit=0", ["shard_cache_limit", "0", "GiB"]),
        ("stages.codec.epochs=0", ["stages.codec.epochs"]),
        ("stages.codec.trains=[compression,backbone]", ["stages.codec.trains"]),
        ("stages.codec.trains=[decoder]", ["decoder", "compression"]),
        ("stages.ssl.contrast=0", ["stages.ssl.contrast"]),
        ("stages.ssl.optimizer=lion", ["lion", "adamw"]),
        ("stages.ssl.batch_size=2", ["stages.ssl.batch_size", "4"]),
        ("stages.codec.features=[1,2]", ["stages.codec.features"]),
        ("stages.codec.target_bpp=-1", ["stages.codec.target_bpp"]),
        ("stages.codec.rates=[1,2]", ["stages.codec.rates", "codec.rate_points=1"]),
        ("codec.rate_points=2", ["stages.codec.rates", "codec.rate_points=2"]),
        ("stages.codec.balance=1.5", ["stages.codec.balance=1.5", "0..1"]),
        ("stages.codec.lr_fan_in=-1", ["stages.codec.lr_fan_in=-1", "number of inputs"]),
        ("stages.ssl.lr_fan_in=128", ["stages.ssl.lr_fan_in=128", "optimizer=sgd", "0 leaves it out"]),
        ("codec.guard=1", ["codec.guard", "0.01"]),
        ("codec.context=chequerboard", ["chequerboard", "checkerboard"]),
        ("codec.block=conv2fromer", ["block", "conv2former"]),
        ("codec.backbone=resnet51", ["resnet51", "resnet50"]),
        ("ssl.method=mocov2", ["mocov2", "moco"]),
        ("ssl.heatmap.method=eigencan", ["eigencan", "eigencam"]),
        ("imagesize=64", ["imagesize", "image_size"]),
        ("workers=two", ["workers", "two"]),
    ],
)
def test_resolve__bad_values_are_named_with_the_remedy(override: str, words: list[str]):
    with pytest.raises(ValueError) as caught:
        resolve("small", [*DATA, override])
    assert type(caught.value).__module__.split(".")[0] in {"cluster", "pretrain"}
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_resolve__recomputation_in_micro_batches_of_several_workers_is_refused():
    options = ["activation_checkpointing=true", "accumulate=2"]
    assert resolve("small", [*DATA, *options, "workers=1"]).accumulate == 2
    with pytest.raises(ValueError, match=r"accumulate=2.*workers=2; leave both out"):
        resolve("small", [*DATA, *options, "workers=2"])


def test_num_micro_batches__a_worker_holds_no_more_than_it_may():
    config = resolve("small", [*DATA, "micro_batch=10"])
    assert [config.num_micro_batches(share) for share in (8, 10, 11, 43, 64)] == [1, 1, 2, 5, 7]
    assert resolve("small", [*DATA, "micro_batch=10", "accumulate=3"]).num_micro_batches(20) == 3
    assert resolve("small", DATA).num_micro_batches(64) == 1
    assert resolve("small", [*DATA, "micro_batch=2"]).num_micro_batches(3) == 1  # batch norm needs two


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("cluster.min_workers=3", ["cluster.min_workers=3", "workers=2", "1..2"]),
        ("cluster.accelerator=tpu", ["cluster.accelerator=tpu", "auto, cpu, gpu"]),
        ("cluster.placement=near", ["cluster.placement=near", "pack, spread"]),
        ("cluster.max_failures=-1", ["cluster.max_failures=-1", "at least 0"]),
        ("cluster.timeout_seconds=0", ["cluster.timeout_seconds=0", "at least 1"]),
        ("cluster.cpus_per_worker=0", ["cluster.cpus_per_worker=0", "at least 1"]),
        ("cluster.resize_seconds=-2", ["cluster.resize_seconds=-2", "at least 0"]),
        ("micro_batch=1", ["micro_batch=1", "at least 2"]),
        ("keep_checkpoints=0", ["keep_checkpoints=0", "at least 1"]),
        ("keep_every=-5", ["keep_every=-5", "at least 0"]),
    ],
)
def test_resolve__what_no_cluster_can_do_is_refused(override: str, words: list[str]):
    with pytest.raises(ValueError) as caught:
        resolve("small", [*DATA, "workers=2", override])
    assert all(word in str(caught.value) for word in words), caught.value


def test_resolve__missing_data_is_named():
    with pytest.raises(ValueError, match="data"):
        resolve("small", [])
