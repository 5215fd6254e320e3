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
    with pytest.raises(ValueError, match=r"accumulate=2.*workers=2.*set accumulate=1"):
        resolve("small", [*DATA, *options, "workers=2"])


def test_resolve__missing_data_is_named():
    with pytest.raises(ValueError, match="data"):
        resolve("small", [])
