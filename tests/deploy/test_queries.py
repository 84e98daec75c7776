"""Metrics and labels in queries of rules, dashboard and documentation."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.support.monitoring import (
    PROMETHEUS_METRICS,
    PromQuery,
    dashboard_queries,
    documented_queries,
    recording_rules,
    rule_queries,
    unknown_names,
)


@pytest.fixture
def known(metric_labels: dict[str, frozenset[str]]) -> dict[str, frozenset[str]]:
    """Labels of all metrics that queries may use."""
    return {**metric_labels, **recording_rules(), **PROMETHEUS_METRICS}


@pytest.mark.parametrize("queries", [rule_queries, dashboard_queries, documented_queries])
def test_metrics_and_labels_in_queries_exist(
    queries: Callable[[], Iterator[PromQuery]], known: dict[str, frozenset[str]]
) -> None:
    used = list(queries())
    assert len(used) > 10
    wrong = {query: unknown for query in used if (unknown := unknown_names(query.text, known))}
    assert wrong == {}


@pytest.mark.parametrize(
    ("text", "unknown"),
    [
        ("sum(rate(kronos_updates_total[5m]))", []),
        ("sum(rate(kronos_made_up_total[5m])) / 2", ["kronos_made_up_total"]),
        ("kronos_updates > bool 1", ["kronos_updates"]),
        ('kronos_updates_total{venu="binance"}', ["kronos_updates_total: venu"]),
        ("sum by (venu, job) (-kronos_updates_total)", ["kronos_updates_total: venu"]),
        ("max_over_time(sum(kronos_madeup)[5m:1m])", ["kronos_madeup"]),
        ("up * on (role) group_left kronos_build_info", ["up: role"]),
        ("topk(2, kronos_ready) unless kronos_raedy", ["kronos_raedy"]),
        ("sum by (sink) (kronos_delivered_total unless on (job) kronos_ready)", []),
        ("sum by (sink) (kronos_delivered_total or kronos_ready)", ["kronos_ready: sink"]),
        ("sum by (x) (rate(kronos_tasks[5m]))", ["kronos_tasks: x"]),
        ('label_replace(x, "a", "$1", "b", "kronos_(.*)")', ["x"]),
        ('{__name__="kronos_x"}', ["None"]),
    ],
)
def test_unknown_names_are_found(
    text: str, unknown: list[str], known: dict[str, frozenset[str]]
) -> None:
    assert unknown_names(text, known) == unknown
