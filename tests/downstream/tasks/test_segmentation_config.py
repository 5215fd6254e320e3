from __future__ import annotations

from typing import Any

import pytest

from downstream.errors import TaskError
from downstream.tasks.segmentation_config import SegmentationConfig


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"gate": "soft"}, "gate=soft.*dynamic"),
        ({"transform": "unet"}, "transform=unet.*deconv"),
        ({"codec": None}, "latents=codec needs a codec"),
        ({"transform": "synthesis", "latents": "mbt2018"}, "transform=synthesis with latents=mbt2018"),
        ({"gate": "static"}, "select-channels"),
        ({"channels": "c.json"}, "gate=dynamic channels=c.json"),
        ({"epochs": 0}, "epochs=0"),
        ({"micro_batch": 1}, "micro_batch=1"),
        ({"height": 20}, "height=20"),
        ({"lr": 0.0}, "lr=0"),
        ({"scale_min": 3.0}, "scale_min=3"),
        ({"gate": None}, "gate=null"),
        ({"feature_weight": -1.0}, "feature_weight=-1"),
        ({"start": "imagenet"}, "start=imagenet"),
    ],
)
def test_config__refuses_what_cannot_work(values: dict[str, object], words: str):
    with pytest.raises(TaskError, match=words):
        SegmentationConfig(**{"data": "d", "codec": "c", **values}).validate()


def test_config__defaults_are_possible():
    SegmentationConfig(data="d", codec="c").validate()


@pytest.mark.parametrize(
    ("values", "stages"),
    [
        ({}, ["teacher", "student"]),
        ({"transform_epochs": 2}, ["teacher", "transform", "student"]),
        ({"teacher": "t"}, ["student"]),
        ({"init": "r"}, ["teacher", "student"]),
        ({"init": "r", "feature_weight": 0.0}, ["student"]),  # nothing is compared with a teacher, nor begun from one
        ({"init": "r", "epochs": 0, "transform_epochs": 2}, ["student"]),
        ({"init": "r", "epochs": 0, "input": "pixels"}, ["pixels"]),
    ],
)
def test_stages__are_those_whose_weights_are_used(values: dict[str, Any], stages: list[str]):
    config = SegmentationConfig(codec="c", data="d", **values)
    config.validate()
    assert list(config.stages(16)) == stages
