"""Documents that list options list all of them; those of pretraining with their defaults."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import yaml
from conftest import REPOSITORY

from data_pipeline.views import ViewConfig
from downstream.tasks import task_class
from pretrain.codec.config import CodecConfig
from pretrain.config import PretrainConfig, StageConfig
from pretrain.ssl.config import HeatmapConfig, SSLConfig

DOCS = REPOSITORY / "docs"
TABLES: dict[str, type] = {
    "option": PretrainConfig,
    "`stages.NAME.`": StageConfig,
    "`ssl.`": SSLConfig,
    "`ssl.heatmap.`": HeatmapConfig,
    "`views.`": ViewConfig,
    "`codec.`": CodecConfig,
}
ELSEWHERE = {"cluster", "codec", "ssl", "views", "heatmap", "name"}  # tables of their own, and what names a stage


def rows_of(head: str) -> dict[str, str]:
    """Default, as it is written, by option, of the table whose first cell is `head`."""
    table = (DOCS / "pretraining.md").read_text().split(f"\n| {head} | default | meaning |\n", 1)[1].split("\n\n", 1)[0]
    defaults = {}
    for row in table.splitlines()[1:]:
        keys = re.findall(r"`(\w+)`", row.split("|")[1])
        cell = row.split("|")[2].strip()
        values = cell.split(", ") if len(keys) > 1 else [cell]
        defaults |= dict(zip(keys, values * len(keys) if len(values) == 1 else values, strict=False))
    return defaults


def written(default: Any) -> str:
    """A default, as tables have it."""
    if default is None:
        return "none"
    if isinstance(default, float):
        return {3 / 4: "3/4", 4 / 3: "4/3", 1e-7: "1e-7"}.get(default, f"{default:g}")
    return str(default).lower() if isinstance(default, bool) else str(default)


@pytest.mark.parametrize("head", TABLES)
def test_pretraining__every_option_is_there_with_its_default(head: str):
    told = rows_of(head)
    fields = {field.name: field for field in dataclasses.fields(TABLES[head]) if field.name not in ELSEWHERE}
    assert set(told) == set(fields)
    for key, field in fields.items():
        default = field.default
        if default is dataclasses.MISSING and field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if default == "???":
            assert told[key] == ""
        elif key == "init_parts":
            assert told[key] == "all three"
        elif isinstance(default, list):
            assert [float(value) for value in yaml.safe_load(told[key])] == default
        else:
            assert told[key] == written(default), key


@pytest.mark.parametrize("task", ["classification", "detection", "instance_segmentation", "semantic_segmentation"])
def test_tasks__every_option_is_named(task: str):
    code = " ".join(re.findall(r"`([^`\n]+)`", (DOCS / "tasks.md").read_text()))
    fields = {field.name for field in dataclasses.fields(task_class(task).Config)}
    assert fields - set(re.findall(r"\w+", code)) <= {"task", "chosen"}  # by the recipe; by `channels`
