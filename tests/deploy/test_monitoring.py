"""Alerts, dashboard and runbook: what they name exists, each alert fires, rests and is explained.

A real Prometheus scrapes a real daemon, evaluates the rules and answers every query.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple
from urllib.request import Request, urlopen

import promql_parser as promql
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.support.daemon_process import DaemonProcess
from tests.support.exchange_process import ExchangeProcess
from tests.support.paths import ROOT
from tests.support.processes import wait_for
from tests.support.prometheus import Prometheus

RULES = ROOT / "deploy" / "prometheus" / "rules.yaml"
RULES_TEST = RULES.with_name("rules_test.yaml")
SCRAPING = RULES.with_name("prometheus.yaml")
DASHBOARD = ROOT / "deploy" / "grafana" / "kronos-stream.json"
RUNBOOK = ROOT / "docs" / "operations.md"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

TOKEN = "only-for-this-test-1"  # noqa: S105
TARGET = frozenset({"job", "instance", "namespace"})
"""Labels that Prometheus gives, the last one in Kubernetes."""
OTHERS = {
    "up": frozenset[str](),
    "ALERTS": frozenset({"alertname", "alertstate", "severity", "venue", "sink"}),
}
"""What Prometheus itself tells."""
CHOSEN = {
    "$__rate_interval": "5s",
    "$job": "kronos-stream",
    "$instance": ".+",
    "$venue": ".+",
    "$timeframe": ".+",
}
"""What stands for the dashboard's variables."""
QUIET = {
    "Alerts": "none fires",
    "Candles not read yet": "role forecast only",
}
"""What a daemon that forecasts into a file leaves empty, and why."""

Json = dict[str, Any]


class PromQuery(NamedTuple):
    """PromQL, and where it stands."""

    where: str
    text: str


def _rules() -> list[Json]:
    groups = yaml.safe_load(RULES.read_text("utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


def _dashboard() -> Json:
    return dict(json.loads(DASHBOARD.read_text("utf-8")))


def _alerts() -> list[Json]:
    return [rule for rule in _rules() if "alert" in rule]


def _of_rules() -> Iterator[PromQuery]:
    for rule in _rules():
        yield PromQuery(rule.get("alert") or rule["record"], rule["expr"])


def _of_dashboard() -> Iterator[PromQuery]:
    board = _dashboard()
    for panel in board["panels"]:
        for target in panel.get("targets", ()):
            yield PromQuery(panel["title"], _chosen(target["expr"]))
    for one in board["annotations"]["list"]:
        if "expr" in one:
            yield PromQuery(one["name"], _chosen(one["expr"]))
    for variable in board["templating"]["list"]:
        if variable["type"] == "query":
            found = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"]["query"])
            assert found, variable["name"]
            yield PromQuery(variable["name"], f"count by ({found[2]}) ({_chosen(found[1])})")


def _of_pages() -> Iterator[PromQuery]:
    for page in PAGES:
        text = page.read_text("utf-8")
        for found in re.findall(r"^```promql\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            yield PromQuery(page.name, found)


def _chosen(text: str) -> str:
    for name, value in CHOSEN.items():
        text = text.replace(name, value)
    assert "$" not in text, text
    return text


def _recording_rules() -> dict[str, frozenset[str]]:
    """What rules record: name → labels."""
    return {
        rule["record"]: frozenset(rule.get("labels", {})) for rule in _rules() if "record" in rule
    }


def _unknown(text: str, known: Mapping[str, frozenset[str]]) -> list[str]:
    """Metrics of an expression that do not exist, and labels that those it has have not."""
    found: list[str] = []

    def asked(vector: promql.VectorSelector, labels: Iterable[str]) -> None:
        has = TARGET | known.get(str(vector.name), frozenset(labels))
        found.extend(f"{vector.name}: {label}" for label in labels if label not in has)

    def look(one: promql.Expr) -> None:
        if isinstance(one, promql.VectorSelector):
            if str(one.name) not in known:
                found.append(str(one.name))
            asked(one, [matcher.name for matcher in one.matchers.matchers])
        elif isinstance(one, promql.AggregateExpr):
            if one.modifier and one.modifier.type == promql.AggModifierType.By:
                for vector in _labelling(one.expr):
                    asked(vector, one.modifier.labels)
        elif isinstance(one, promql.BinaryExpr) and one.modifier and one.modifier.matching:
            for vector in (*_labelling(one.lhs), *_labelling(one.rhs)):
                asked(vector, one.modifier.matching.labels)

    promql.walk(promql.parse(text), look)
    return found


def _labelling(one: promql.Expr) -> Iterator[promql.VectorSelector]:
    """Those whose labels the result has: not what it is only compared with."""
    if isinstance(one, promql.VectorSelector):
        yield one
    elif isinstance(one, promql.MatrixSelector):
        yield one.vector_selector
    elif isinstance(one, promql.BinaryExpr):
        yield from _labelling(one.lhs)
        if str(one.op) not in {"and", "unless"}:
            yield from _labelling(one.rhs)
    elif isinstance(one, promql.Call):
        for argument in one.args:
            yield from _labelling(argument)
    elif hasattr(one, "expr"):
        yield from _labelling(one.expr)


@pytest.fixture
def known(metric_labels: dict[str, frozenset[str]]) -> dict[str, frozenset[str]]:
    return {**metric_labels, **_recording_rules(), **OTHERS}


@pytest.mark.parametrize("queries", [_of_rules, _of_dashboard, _of_pages])
def test_metrics_and_labels_in_queries_exist(
    queries: Callable[[], Iterator[PromQuery]], known: dict[str, frozenset[str]]
) -> None:
    asked = list(queries())
    assert len(asked) > 10
    wrong = {query: unknown for query in asked if (unknown := _unknown(query.text, known))}
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
def test_what_does_not_exist_is_found(
    text: str, unknown: list[str], known: dict[str, frozenset[str]]
) -> None:
    assert _unknown(text, known) == unknown


def _sections() -> dict[str, str]:
    """Of the runbook: anchor → text."""
    whole = RUNBOOK.read_text("utf-8")
    _, _, part = whole.partition("\n## When an alert fires\n")
    part, _, _ = part.partition("\n## ")
    pieces = re.split(r"^### (.+)$", part, flags=re.MULTILINE)[1:]
    return {
        title.lower().replace(" ", "-"): text
        for title, text in zip(pieces[::2], pieces[1::2], strict=True)
    }


def test_every_alert_says_what_it_is_and_leads_to_its_section() -> None:
    sections = _sections()
    led_to = set()
    for alert in _alerts():
        name, notes = alert["alert"], alert["annotations"]
        assert re.fullmatch(r"Kronos[A-Z]\w+", name)
        assert alert["labels"]["severity"] in {"critical", "warning"}, name
        assert re.fullmatch(r"\d+[smh]", alert["for"]), name
        assert notes["summary"], name
        assert notes["description"].endswith("."), name
        path, _, anchor = notes["runbook_url"].partition("#")
        assert (ROOT / path).resolve() == RUNBOOK, name
        assert f"\n`{name}`, " in sections[anchor], name
        assert alert["labels"]["severity"] in sections[anchor], name
        led_to.add(anchor)
    assert led_to == sections.keys()


def test_every_section_says_what_to_do() -> None:
    for anchor, text in _sections().items():
        for part in ("- **Look:** ", "- **Do:** ", "- **Ends** "):
            assert text.count(f"\n{part}") == 1, (anchor, part)


def test_rules_are_taken_and_do_what_their_tests_say(promtool: str) -> None:
    for command in (
        ["check", "rules", str(RULES)],
        ["test", "rules", str(RULES_TEST)],
        ["check", "config", str(SCRAPING)],
    ):
        ran = subprocess.run([promtool, *command], capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stdout + ran.stderr


def test_the_tests_of_rules_can_fail(promtool: str, tmp_path: Path) -> None:
    shutil.copy(RULES_TEST, tmp_path)
    text = RULES.read_text("utf-8")
    (tmp_path / RULES.name).write_text(text.replace("kronos_held_series > 0", "vector(0)"), "utf-8")
    ran = subprocess.run(
        [promtool, "test", "rules", str(tmp_path / RULES_TEST.name)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode != 0
    assert "KronosGapsOpen" in ran.stdout + ran.stderr


def test_every_alert_is_tested_firing_and_at_rest() -> None:
    checks = [
        check
        for case in yaml.safe_load(RULES_TEST.read_text("utf-8"))["tests"]
        for check in case["alert_rule_test"]
    ]
    fires = {check["alertname"] for check in checks if check["exp_alerts"]}
    rests = {check["alertname"] for check in checks if not check["exp_alerts"]}
    assert fires == rests == {alert["alert"] for alert in _alerts()}


def _panels() -> list[Json]:
    return [panel for panel in _dashboard()["panels"] if panel["type"] != "row"]


def test_the_dashboard_is_whole() -> None:
    board = _dashboard()
    assert board["uid"] == board["title"] == "kronos-stream"
    assert board["schemaVersion"] >= 39
    assert board["id"] is None
    names = [variable["name"] for variable in board["templating"]["list"]]
    assert names == ["datasource", "job", "instance", "venue", "timeframe"]
    ids = [panel["id"] for panel in board["panels"]]
    assert len(ids) == len(set(ids))
    titles = [panel["title"] for panel in board["panels"]]
    assert len(titles) == len(set(titles))
    text = json.dumps(board)
    for name in names:
        assert f"${{{name}}}" in text or f"${name}" in text, name
    assert "libraryPanel" not in text
    for panel in _panels():
        assert panel["type"] in {"stat", "timeseries", "heatmap", "table"}
        assert panel["description"], panel["title"]
        assert panel["targets"], panel["title"]
        for one in (panel, *panel["targets"]):
            assert one["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        letters = [target["refId"] for target in panel["targets"]]
        assert len(letters) == len(set(letters))
        for target in panel["targets"]:
            assert 'job=~"$job", instance=~"$instance"' in target["expr"]


def test_no_panel_lies_on_another() -> None:
    places = {panel["title"]: panel["gridPos"] for panel in _dashboard()["panels"]}
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


# With a real Prometheus and a real daemon.


@pytest.fixture
def daemon(tmp_path: Path, token: str) -> Iterator[DaemonProcess]:
    """Forecasts one-second bars into a file, and is at work."""
    with ExchangeProcess("--symbols", "3", "--history", "300") as exchange:
        settings = {
            **exchange.settings(),
            "SINKS": "jsonl",
            "JSONL__PATH": str(tmp_path / "forecasts.jsonl"),
            "MODEL": "nano",
            "LOOKBACK": "96",
            "HORIZON": "8",
            "PATHS": "20",
        }
        if token:
            settings["HTTP__TOKEN"] = token
        with DaemonProcess(tmp_path, settings) as daemon:
            daemon.start()
            daemon.wait_until_ready()
            yield daemon


def _scraping(daemon: DaemonProcess, folder: Path, token: str) -> str:
    """The scrape configuration that we ship, for this daemon and for tests' haste."""
    text = SCRAPING.read_text("utf-8").replace("15s", "1s")
    text = text.replace("localhost:8080", f"127.0.0.1:{daemon._port}")
    folder.mkdir()
    shutil.copy(RULES, folder)
    if token:
        stranger = text[text.index("  - job_name:") :].replace("kronos-stream\n", "stranger\n", 1)
        text, times = re.subn(r"# (authorization:\n    )# (  credentials_file)", r"\1\2", text)
        assert times == 1
        text += stranger
        (folder / "kronos-stream.token").write_text(token, "ascii")
    return text


@pytest.mark.parametrize("token", ["", TOKEN], ids=["open", "token"])
def test_prometheus_watches_a_daemon(
    daemon: DaemonProcess,
    token: str,
    tmp_path: Path,
    make_prometheus: Callable[[str], Prometheus],
    known: dict[str, frozenset[str]],
) -> None:
    assert daemon.is_ready()  # finds its port
    with make_prometheus(_scraping(daemon, tmp_path / "prometheus", token)) as prometheus:
        targets = 2 if token else 1  # one to whom the token was not told
        wait_for("all are scraped", lambda: len(prometheus.query("up")) == targets)
        target, *stranger = _targets(prometheus)
        assert target["health"] == "up", target["lastError"]
        assert [one["health"] for one in stranger] == ["down"] * (targets - 1)
        assert all("401" in one["lastError"] for one in stranger)
        ours = {"job": "kronos-stream", "instance": f"127.0.0.1:{daemon._port}"}
        assert prometheus.query("kronos_ready") == [({"__name__": "kronos_ready", **ours}, 1.0)]

        # All that queries name is there, and all that is there is known.
        there = _metric_families(daemon, token) | OTHERS.keys()
        for query in (*_of_dashboard(), *_of_rules(), *_of_pages()):
            assert _metrics(query.text) - _recording_rules().keys() <= there, query
        assert {name for name in there if name not in known} == set()

        for query in (*_of_dashboard(), *_of_rules(), *_of_pages()):
            prometheus.query(query.text)  # it is taken
        _rules_are_evaluated(prometheus)
        deadline = time.monotonic() + 30.0
        while (empty := _empty(prometheus)) and time.monotonic() < deadline:
            time.sleep(0.5)
        assert empty == []
        _commands_of_the_runbook_work(daemon, token)

        daemon.kill()
        pending = 'ALERTS{alertname="KronosDown", alertstate="pending", job="kronos-stream"}'
        wait_for("it is missed", lambda: prometheus.query(pending))


def _targets(prometheus: Prometheus) -> list[Json]:
    found = list(prometheus.api_get("targets")["activeTargets"])
    return sorted(found, key=lambda target: str(target["labels"]["job"]))


def _metric_families(daemon: DaemonProcess, token: str) -> set[str]:
    """Names of samples that the daemon tells, also where it has none yet; and of histograms."""
    request = Request(f"http://127.0.0.1:{daemon._port}/metrics")
    request.add_header("Authorization", f"Bearer {token}")
    with urlopen(request, timeout=10) as answer:  # noqa: S310
        text = answer.read().decode()
    suffixes = {"counter": ("_total",), "histogram": ("", "_bucket", "_count", "_sum")}
    return {
        f"{family.name}{suffix}"
        for family in text_string_to_metric_families(text)
        for suffix in suffixes.get(family.type, ("",))
    }


def _metrics(text: str) -> set[str]:
    """Names that an expression has."""
    found: set[str] = set()

    def look(expression: promql.Expr) -> None:
        if isinstance(expression, promql.VectorSelector):
            found.add(str(expression.name))

    promql.walk(promql.parse(text), look)
    return found


def _rules_are_evaluated(prometheus: Prometheus) -> None:
    def evaluated() -> list[Json]:
        groups = prometheus.api_get("rules")["groups"]
        return [rule for group in groups for rule in group["rules"]]

    wait_for("rules are evaluated", lambda: all(r["evaluationTime"] for r in evaluated()))
    assert len(evaluated()) == len(_rules())
    for rule in evaluated():
        assert (rule["health"], rule.get("lastError", "")) == ("ok", ""), rule["name"]


def _empty(prometheus: Prometheus) -> list[str]:
    """Panels, and choices above them, that show nothing."""
    return [
        query.where
        for query in _of_dashboard()
        if query.where not in QUIET and not prometheus.query(query.text)
    ]


def _commands_of_the_runbook_work(daemon: DaemonProcess, token: str) -> None:
    text = RUNBOOK.read_text("utf-8")
    commands = set(re.findall(r"`(curl [^`]+)`|^\$ (curl .+)$", text, re.MULTILINE))
    assert len(commands) > 2
    for command in commands:
        line = "".join(command).replace("localhost:8080", f"127.0.0.1:{daemon._port}")
        if token:
            line = line.replace("curl ", f'curl -H "Authorization: Bearer {token}" ', 1)
        if shutil.which("jq") is None:
            line = line.partition(" | jq")[0]
        ran = subprocess.run(
            ["bash", "-c", f"set -o pipefail; {line.replace('curl ', 'curl --fail ', 1)}"],  # noqa: S607
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert ran.returncode == 0, (line, ran.stderr)
