from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import FOUR_STAGES

from pretrain.codec.feature_codec import FeatureCodec
from pretrain.config import PretrainConfig
from pretrain.errors import CodecError, ConfigError
from pretrain.initialize import begins_compression, create_codec
from pretrain.run import resolve


def small_config(init: Path, *options: str) -> PretrainConfig:
    saved = vars(FeatureCodec.from_pretrained(init).config)
    shape = [f"codec.{key}={value}" for key, value in saved.items() if key != "pretrained"]
    return resolve("small", ["data=none", "only=[]", f"init={init}", *shape, *options])


def test_create_codec__takes_only_the_parts_named(exported_codec: Path):
    start = FeatureCodec.from_pretrained(exported_codec)
    codec = create_codec(small_config(exported_codec, "init_parts=[backbone,redundancy]"))
    assert torch.equal(codec.backbone.layer1[0].conv1.weight, start.backbone.layer1[0].conv1.weight)
    assert torch.equal(codec.redundancy.encoder[0].weight, start.redundancy.encoder[0].weight)
    assert not torch.equal(codec.g_a[-1].weight, start.g_a[-1].weight)


def test_create_codec__a_part_that_starts_fresh_may_have_another_shape(exported_codec: Path):
    start = FeatureCodec.from_pretrained(exported_codec)
    channels = start.config.re_channels + 4
    codec = create_codec(small_config(exported_codec, "init_parts=[backbone]", f"codec.re_channels={channels}"))
    assert torch.equal(codec.backbone.layer1[0].conv1.weight, start.backbone.layer1[0].conv1.weight)
    assert len(codec.redundancy.encoder[0].weight) == channels


def test_create_codec__a_part_that_is_taken_may_not(exported_codec: Path):
    channels = FeatureCodec.from_pretrained(exported_codec).config.re_channels
    config = small_config(exported_codec, f"codec.re_channels={channels + 4}")
    with pytest.raises(CodecError, match=f"has codec.re_channels={channels}.*leave redundancy out of init_parts"):
        create_codec(config)


def test_init_parts__unknown_name(exported_codec: Path):
    with pytest.raises(ConfigError, match="init_parts=head is unknown; use one of backbone, redundancy, compression"):
        small_config(exported_codec, "init_parts=[head]")


def test_begins_compression__only_where_it_is_first_trained_and_fresh(tmp_path: Path):
    def begins(*options: str) -> list[bool]:
        config = resolve("small", ["data=none", *FOUR_STAGES, *options])
        return [begins_compression(config, index) for index in range(len(config.stages))]

    assert begins() == [False, False, False, True]
    assert begins("stages.codec.klt=false") == [False] * 4
    assert begins("stages.redundancy.trains=[compression]") == [False, True, False, False]
    assert begins(f"init={tmp_path}") == [False] * 4
    assert begins(f"init={tmp_path}", "init_parts=[backbone]") == [False, False, False, True]
