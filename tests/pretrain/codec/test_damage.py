"""A small run of tests/benchmarks/damage.py; the whole one has 20,000 streams."""

from __future__ import annotations

import runpy

import pytest
import torch
from conftest import REPOSITORY
from small_codecs import wake

from pretrain.codec.config import CodecConfig
from pretrain.codec.feature_codec import FeatureCodec
from pretrain.errors import BitstreamError

BENCHMARK = runpy.run_path(str(REPOSITORY / "tests" / "benchmarks" / "damage.py"))
Damage, noise = BENCHMARK["Damage"], BENCHMARK["noise"]
NARROW = {
    "backbone": "resnet18", "re_channels": 16, "re_latent": 16, "re_depths": [1, 1, 1], "transform_channels": 16,
    "latent_channels": 32, "hyper_dim": 24, "hyper_heads": 2, "hyper_head_dim": 12, "z_channels": 8,
}  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        {"base_channels": 16},
        {"rate_points": 3, "guard": 1e-3},
        {"context": "space_channel", "context_depth": 1},
        {"channels": [1, 4, 5, 30]},
    ],
    ids=["layers", "rates", "context", "channels"],
)
def test_decode__damage_of_every_kind_ends_in_one_error(options: dict[str, object]):
    torch.manual_seed(0)
    options = dict(options)
    channels = options.pop("channels", None)
    codec = wake(FeatureCodec(CodecConfig(**NARROW, **options)).eval().requires_grad_(False))
    good = [codec.encode(noise(*size, seed), channels=channels) for seed, size in enumerate([(16, 16), (64, 200)])]
    damage, refused = Damage(good, seed=1), 0
    for _ in range(300):
        stream = damage()
        try:
            codec.decode(stream)
        except BitstreamError:
            refused += 1
        else:
            assert damage.forged, stream.hex()  # checksums that fit may decode to other features
    assert refused > 200
