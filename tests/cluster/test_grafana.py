"""The dashboard shows metrics that runs export, each panel in a place of its own."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest

from cluster.gauges import GAUGES

DASHBOARD = Path(__file__).parents[2] / "cluster" / "manifests" / "grafana_dashboard.json"
METRICS = {gauge.name for gauge in GAUGES.values()}
COLUMNS = 24  # of Grafana's grid
FUNCTIONS = {"max", "avg", "by", "delta"}


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    return json.loads(DASHBOARD.read_text())


def expressions(dashboard: dict[str, Any]) -> list[str]:
    """All queries of panels and annotations."""
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    return [*queries, *(annotation["expr"] for annotation in dashboard["annotations"]["list"])]


def test_dashboard__asks_for_metrics_of_runs_alone(dashboard):
    for expression in expressions(dashboard):
        selectors = re.findall(r"(\w+)(\{[^}]*\})", expression)
        assert selectors, expression
        for name, labels in selectors:
            assert name.startswith("ray_") and name.removeprefix("ray_") in METRICS, expression
            assert labels == '{run=~"$run"}', expression
        rest = re.sub(r"\w+\{[^}]*\}", "", expression)
        assert set(re.findall(r"[a-z_]{2,}", rest)) <= FUNCTIONS | {"run"}, expression


def test_dashboard__shows_every_metric(dashboard):
    shown = {name for expression in expressions(dashboard) for name in re.findall(r"ray_(\w+)\{", expression)}
    assert shown == METRICS


def test_dashboard__recoveries_are_annotations(dashboard):
    (annotation,) = dashboard["annotations"]["list"]
    assert annotation["enable"] and "ray_dicm_recoveries{" in annotation["expr"]


def test_dashboard__variables_choose_data_source_and_run(dashboard):
    variables = {variable["name"]: variable for variable in dashboard["templating"]["list"]}
    assert set(variables) == {"datasource", "run"}
    assert variables["datasource"]["type"] == "datasource" and variables["datasource"]["query"] == "prometheus"
    assert variables["run"]["query"]["query"] == variables["run"]["definition"] == "label_values(ray_dicm_step, run)"
    assert variables["run"]["multi"] and variables["run"]["includeAll"]
    panels = dashboard["panels"]
    queries = [*panels, *(target for panel in panels for target in panel["targets"]), *dashboard["annotations"]["list"]]
    assert all(query["datasource"] == {"type": "prometheus", "uid": "${datasource}"} for query in queries)
    assert dashboard["schemaVersion"] >= 36  # data sources by type and uid


def test_dashboard__panels_have_ids_titles_and_places_of_their_own(dashboard):
    panels = dashboard["panels"]
    for key in ("id", "title"):
        assert len({panel[key] for panel in panels}) == len(panels)
    places = [panel["gridPos"] for panel in panels]
    for place in places:
        assert place["x"] >= 0 and place["y"] >= 0 and place["w"] > 0 and place["h"] > 0
        assert place["x"] + place["w"] <= COLUMNS
    for one, other in itertools.combinations(places, 2):
        apart = [one[start] + one[size] <= other[start] or other[start] + other[size] <= one[start]
                 for start, size in (("x", "w"), ("y", "h"))]  # fmt: skip
        assert any(apart), (one, other)


def test_dashboard__queries_of_a_panel_have_names_of_their_own(dashboard):
    for panel in dashboard["panels"]:
        names = [target["refId"] for target in panel["targets"]]
        assert len(set(names)) == len(names)
        used = {override["matcher"]["options"] for override in panel["fieldConfig"]["overrides"]}
        assert used <= set(names), panel["title"]
