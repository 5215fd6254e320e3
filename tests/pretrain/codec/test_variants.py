"""Codecs without one of their parts, as ablations compare them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_codecs import NARROW

from pretrain.codec.feature_codec import FeatureCodec
from pretrain.codec.gated_conv import RGCBlock
from pretrain.codec.hyperprior import WindowedAttention
from pretrain.codec.identity import LATER
from pretrain.codec.redundancy import RedundancyElimination

WITHOUT = {
    RedundancyElimination: {"redundancy": False},
    RGCBlock: {"rgc_orders": [0, 0, 0]},
    WindowedAttention: {"hyperprior": "conv"},
}


@pytest.mark.parametrize("part", WITHOUT)
def test_codec__without_a_part_codes_images_of_any_size(part: type, tmp_path: Path):
    whole = FeatureCodec(NARROW)
    assert any(isinstance(module, part) for module in whole.modules())
    codec = FeatureCodec(replace(NARROW, **WITHOUT[part])).eval()
    assert not any(isinstance(module, part) for module in codec.modules())
    codec.save_pretrained(tmp_path)
    image = torch.randint(0, 256, (3, 70, 50), dtype=torch.uint8)
    f3 = FeatureCodec.from_pretrained(tmp_path).decode(codec.encode(image))
    assert f3.shape == (1, 64, 18, 13) and torch.equal(f3, codec.decode(codec.encode(image)))


@pytest.mark.parametrize("part", WITHOUT)
def test_codec__without_a_part_learns(part: type):
    codec = FeatureCodec(replace(NARROW, **WITHOUT[part])).train()
    output = codec(torch.randn(2, 3, 64, 64))
    (output.f3.square().mean() + output.bits.mean()).backward()
    assert all(parameter.grad is not None for parameter in (*codec.g_a.parameters(), *codec.h_s.parameters()))


def test_codec__without_redundancy_elimination_f2_is_f1():
    codec = FeatureCodec(replace(NARROW, redundancy=False)).eval()
    output = codec(torch.randn(1, 3, 64, 64))
    assert torch.equal(output.f1, output.f2) and "y1" not in output.likelihoods


def test_fingerprint__of_codecs_from_before_an_option_is_what_it_was(tmp_path: Path):
    codec = FeatureCodec(NARROW).eval()
    codec.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    facts = json.loads(path.read_text())
    for name in LATER:
        del facts["config"][name]
    path.write_text(json.dumps(facts))
    assert FeatureCodec.from_pretrained(tmp_path).fingerprint == codec.fingerprint
