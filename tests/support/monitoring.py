"""Rules, dashboard and documented queries of the monitoring, and the names that they use."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import promql_parser as promql
import yaml

from tests.support.paths import ROOT

RULES = ROOT / "deploy" / "prometheus" / "rules.yaml"
RULES_TEST = RULES.with_name("rules_test.yaml")
PROMETHEUS_CONFIG = RULES.with_name("prometheus.yaml")
DASHBOARD = ROOT / "deploy" / "grafana" / "kronos-stream.json"
RUNBOOK = ROOT / "docs" / "operations.md"
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

TARGET = frozenset({"job", "instance", "namespace"})
"""Labels added by Prometheus, the last one in Kubernetes."""
PROMETHEUS_METRICS = {
    "up": frozenset[str](),
    "ALERTS": frozenset({"alertname", "alertstate", "severity", "venue", "sink"}),
}
"""Metrics of Prometheus itself, with their labels."""
VARIABLES = {
    "$__rate_interval": "5s",
    "$job": "kronos-stream",
    "$instance": ".+",
    "$venue": ".+",
    "$timeframe": ".+",
}
"""Values of the dashboard's variables."""

Json = dict[str, Any]


class PromQuery(NamedTuple):
    """A PromQL expression and where it is used."""

    where: str
    text: str


def rules() -> list[Json]:
    groups = yaml.safe_load(RULES.read_text("utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


def dashboard() -> Json:
    return dict(json.loads(DASHBOARD.read_text("utf-8")))


def alerts() -> list[Json]:
    return [rule for rule in rules() if "alert" in rule]


def rule_queries() -> Iterator[PromQuery]:
    for rule in rules():
        yield PromQuery(rule.get("alert") or rule["record"], rule["expr"])


def dashboard_queries() -> Iterator[PromQuery]:
    definition = dashboard()
    for panel in definition["panels"]:
        for target in panel.get("targets", ()):
            yield PromQuery(panel["title"], substitute_variables(target["expr"]))
    for annotation in definition["annotations"]["list"]:
        if "expr" in annotation:
            yield PromQuery(annotation["name"], substitute_variables(annotation["expr"]))
    for variable in definition["templating"]["list"]:
        if variable["type"] == "query":
            found = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"]["query"])
            assert found, variable["name"]
            yield PromQuery(
                variable["name"], f"count by ({found[2]}) ({substitute_variables(found[1])})"
            )


def documented_queries() -> Iterator[PromQuery]:
    for document in DOCUMENTS:
        text = document.read_text("utf-8")
        for found in re.findall(r"^```promql\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            yield PromQuery(document.name, found)


def substitute_variables(text: str) -> str:
    for name, value in VARIABLES.items():
        text = text.replace(name, value)
    assert "$" not in text, text
    return text


def recording_rules() -> dict[str, frozenset[str]]:
    """Recorded metrics with the labels that their rules add."""
    return {
        rule["record"]: frozenset(rule.get("labels", {})) for rule in rules() if "record" in rule
    }


def unknown_names(text: str, known: Mapping[str, frozenset[str]]) -> list[str]:
    """Return metrics of an expression that do not exist, and labels that its metrics lack."""
    found: list[str] = []

    def check_labels(vector: promql.VectorSelector, labels: Iterable[str]) -> None:
        existing = TARGET | known.get(str(vector.name), frozenset(labels))
        found.extend(f"{vector.name}: {label}" for label in labels if label not in existing)

    def visit(expression: promql.Expr) -> None:
        if isinstance(expression, promql.VectorSelector):
            if str(expression.name) not in known:
                found.append(str(expression.name))
            check_labels(expression, [matcher.name for matcher in expression.matchers.matchers])
        elif isinstance(expression, promql.AggregateExpr):
            if expression.modifier and expression.modifier.type == promql.AggModifierType.By:
                for vector in _label_sources(expression.expr):
                    check_labels(vector, expression.modifier.labels)
        elif (
            isinstance(expression, promql.BinaryExpr)
            and expression.modifier
            and expression.modifier.matching
        ):
            for vector in (*_label_sources(expression.lhs), *_label_sources(expression.rhs)):
                check_labels(vector, expression.modifier.matching.labels)

    promql.walk(promql.parse(text), visit)
    return found


def _label_sources(expression: promql.Expr) -> Iterator[promql.VectorSelector]:
    """Yield the vectors whose labels the result has, not those it is only compared with."""
    if isinstance(expression, promql.VectorSelector):
        yield expression
    elif isinstance(expression, promql.MatrixSelector):
        yield expression.vector_selector
    elif isinstance(expression, promql.BinaryExpr):
        yield from _label_sources(expression.lhs)
        if str(expression.op) not in {"and", "unless"}:
            yield from _label_sources(expression.rhs)
    elif isinstance(expression, promql.Call):
        for argument in expression.args:
            yield from _label_sources(argument)
    elif hasattr(expression, "expr"):
        yield from _label_sources(expression.expr)


def metric_names(text: str) -> set[str]:
    """Return all metrics of an expression."""
    found: set[str] = set()

    def visit(expression: promql.Expr) -> None:
        if isinstance(expression, promql.VectorSelector):
            found.add(str(expression.name))

    promql.walk(promql.parse(text), visit)
    return found
