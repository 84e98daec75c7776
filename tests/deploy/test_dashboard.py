"""The Grafana dashboard."""

from __future__ import annotations

import json
from itertools import combinations

from tests.support.monitoring import (
    Json,
    dashboard,
)


def _panels() -> list[Json]:
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def test_dashboard_is_complete() -> None:
    definition = dashboard()
    assert definition["uid"] == definition["title"] == "kronos-stream"
    assert definition["schemaVersion"] >= 39
    assert definition["id"] is None
    names = [variable["name"] for variable in definition["templating"]["list"]]
    assert names == ["datasource", "job", "instance", "venue", "timeframe"]
    ids = [panel["id"] for panel in definition["panels"]]
    assert len(ids) == len(set(ids))
    titles = [panel["title"] for panel in definition["panels"]]
    assert len(titles) == len(set(titles))
    text = json.dumps(definition)
    for name in names:
        assert f"${{{name}}}" in text or f"${name}" in text, name
    assert "libraryPanel" not in text
    for panel in _panels():
        assert panel["type"] in {"stat", "timeseries", "heatmap", "table"}
        assert panel["description"], panel["title"]
        assert panel["targets"], panel["title"]
        for element in (panel, *panel["targets"]):
            assert element["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        ids_of_targets = [target["refId"] for target in panel["targets"]]
        assert len(ids_of_targets) == len(set(ids_of_targets))
        for target in panel["targets"]:
            assert 'job=~"$job", instance=~"$instance"' in target["expr"]


def test_panels_do_not_overlap() -> None:
    places = {panel["title"]: panel["gridPos"] for panel in dashboard()["panels"]}
    for title, at in places.items():
        assert 0 <= at["x"] < at["x"] + at["w"] <= 24, title
    for (one, a), (two, b) in combinations(places.items(), 2):
        apart = (
            a["x"] + a["w"] <= b["x"]
            or b["x"] + b["w"] <= a["x"]
            or a["y"] + a["h"] <= b["y"]
            or b["y"] + b["h"] <= a["y"]
        )
        assert apart, (one, two)
