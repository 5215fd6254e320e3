from __future__ import annotations

import subprocess
import sys

import pytest

from pretrain.errors import ConfigError
from pretrain.ssl.config import HeatmapConfig, SSLConfig
from pretrain.ssl.methods import METHODS


def test_validate__defaults_and_every_method_are_valid():
    SSLConfig().validate()
    for method in METHODS:
        SSLConfig(method=method).validate()
    SSLConfig(heatmap=HeatmapConfig(method="none")).validate()


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (SSLConfig(method="mocoo"), "ssl.method=mocoo.*moco"),
        (SSLConfig(queue=0), "ssl.queue=0"),
        (SSLConfig(temperature=0.0), "ssl.temperature=0"),
        (SSLConfig(momentum=1.5), "ssl.momentum=1.5"),
        (SSLConfig(heatmap=HeatmapConfig(method="eigen_cam")), "ssl.heatmap.method=eigen_cam.*eigencam"),
        (SSLConfig(heatmap=HeatmapConfig(layer="layer5")), "ssl.heatmap.layer=layer5.*layer4"),
        (SSLConfig(heatmap=HeatmapConfig(size=112)), "ssl.heatmap.size=112.*32"),
        (SSLConfig(heatmap=HeatmapConfig(threshold=1.0)), "ssl.heatmap.threshold=1"),
        (SSLConfig(heatmap=HeatmapConfig(warmup=-1.0)), "ssl.heatmap.warmup=-1"),
    ],
)
def test_validate__refuses_the_impossible_by_name(config: SSLConfig, words: str):
    with pytest.raises(ConfigError, match=words):
        config.validate()


def test_import__needs_no_torch():
    code = "import sys, pretrain.ssl.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
