from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from small_codecs import create_codec, with_options

from pretrain.codec.entropy import CoderTables, LatentEntropy, solve_quantiles
from pretrain.codec.feature_codec import FeatureCodec


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Networks this narrow lose more by waiting for threads than these save."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def codec() -> FeatureCodec:
    return create_codec().requires_grad_(False)


@pytest.fixture(scope="module")
def folder(codec: FeatureCodec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("codec") / "small"
    codec.save_pretrained(path, extra={"dataset": "noise"})
    return path


@pytest.fixture(scope="module")
def rated(codec: FeatureCodec) -> FeatureCodec:
    return with_options(codec, rate_points=4)


@pytest.fixture(scope="module")
def checkered(codec: FeatureCodec) -> FeatureCodec:
    return with_options(codec, context="checkerboard", context_depth=2, base_channels=0, rate_points=2)


@pytest.fixture(scope="module")
def stepped(codec: FeatureCodec) -> FeatureCodec:
    return with_options(codec, context="space_channel", context_depth=1, base_channels=0, rate_points=2)


@pytest.fixture(scope="module")
def tables() -> CoderTables:
    """Of four channels of z, and of y2."""
    torch.manual_seed(0)
    entropy = LatentEntropy(4)
    solve_quantiles(entropy.z)
    return CoderTables.build(entropy)
