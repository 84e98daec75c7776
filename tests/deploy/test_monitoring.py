"""A real Prometheus with the shipped rules and dashboard scrapes a real daemon."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.support.daemon_process import DaemonProcess
from tests.support.exchange_process import ExchangeProcess
from tests.support.monitoring import (
    PROMETHEUS_CONFIG,
    PROMETHEUS_METRICS,
    RULES,
    RUNBOOK,
    Json,
    dashboard_queries,
    documented_queries,
    metric_names,
    recording_rules,
    rule_queries,
    rules,
)
from tests.support.processes import wait_for
from tests.support.prometheus import Prometheus

TOKEN = "only-for-this-test-1"  # noqa: S105 - an example
EXPECTED_EMPTY = {
    "Alerts": "no alert fires",
    "Unread candles": "role forecast only",
}
"""Panels without data for a daemon that forecasts into a file, with the reason."""


@pytest.fixture
def known(metric_labels: dict[str, frozenset[str]]) -> dict[str, frozenset[str]]:
    """Labels of all metrics that queries may use."""
    return {**metric_labels, **recording_rules(), **PROMETHEUS_METRICS}


@pytest.fixture
def daemon(tmp_path: Path, token: str) -> Iterator[DaemonProcess]:
    """Daemon that forecasts one-second bars into a file, ready."""
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


def _prometheus_config(daemon: DaemonProcess, folder: Path, token: str) -> str:
    """The shipped configuration, for this daemon and with short intervals."""
    text = PROMETHEUS_CONFIG.read_text("utf-8").replace("15s", "1s")
    text = text.replace("localhost:8080", f"127.0.0.1:{daemon._port}")
    folder.mkdir()
    shutil.copy(RULES, folder)
    if token:
        without_token = text[text.index("  - job_name:") :].replace(
            "kronos-stream\n", "without_token\n", 1
        )
        text, times = re.subn(r"# (authorization:\n    )# (  credentials_file)", r"\1\2", text)
        assert times == 1
        text += without_token
        (folder / "kronos-stream.token").write_text(token, "ascii")
    return text


@pytest.mark.parametrize("token", ["", TOKEN], ids=["open", "token"])
def test_prometheus_scrapes_a_daemon(
    daemon: DaemonProcess,
    token: str,
    tmp_path: Path,
    make_prometheus: Callable[[str], Prometheus],
    known: dict[str, frozenset[str]],
) -> None:
    assert daemon.is_ready()  # determines its port
    with make_prometheus(_prometheus_config(daemon, tmp_path / "prometheus", token)) as prometheus:
        targets = 2 if token else 1  # one lacks the token
        wait_for("scrapes of all targets", lambda: len(prometheus.query("up")) == targets)
        target, *without_token = _targets(prometheus)
        assert target["health"] == "up", target["lastError"]
        assert [one["health"] for one in without_token] == ["down"] * (targets - 1)
        assert all("401" in one["lastError"] for one in without_token)
        ours = {"job": "kronos-stream", "instance": f"127.0.0.1:{daemon._port}"}
        assert prometheus.query("kronos_ready") == [({"__name__": "kronos_ready", **ours}, 1.0)]

        # All metrics in queries are exported, and all exported metrics are known.
        exported = _metric_families(daemon, token) | PROMETHEUS_METRICS.keys()
        for query in (*dashboard_queries(), *rule_queries(), *documented_queries()):
            assert metric_names(query.text) - recording_rules().keys() <= exported, query
        assert {name for name in exported if name not in known} == set()

        for query in (*dashboard_queries(), *rule_queries(), *documented_queries()):
            prometheus.query(query.text)  # raises for invalid queries
        _check_rules(prometheus)
        wait_for("data in all panels", lambda: not _empty_panels(prometheus))
        _check_commands_of_the_runbook(daemon, token)

        daemon.kill()
        pending = 'ALERTS{alertname="KronosDown", alertstate="pending", job="kronos-stream"}'
        wait_for("the alert", lambda: prometheus.query(pending))


def _targets(prometheus: Prometheus) -> list[Json]:
    found = list(prometheus.api_get("targets")["activeTargets"])
    return sorted(found, key=lambda target: str(target["labels"]["job"]))


def _metric_families(daemon: DaemonProcess, token: str) -> set[str]:
    """Return names of all samples of the daemon, including those without values yet."""
    request = Request(f"http://127.0.0.1:{daemon._port}/metrics")
    request.add_header("Authorization", f"Bearer {token}")
    with urlopen(request, timeout=300) as response:  # noqa: S310
        text = response.read().decode()
    suffixes = {"counter": ("_total",), "histogram": ("", "_bucket", "_count", "_sum")}
    return {
        f"{family.name}{suffix}"
        for family in text_string_to_metric_families(text)
        for suffix in suffixes.get(family.type, ("",))
    }


def _check_rules(prometheus: Prometheus) -> None:
    def evaluated() -> list[Json]:
        groups = prometheus.api_get("rules")["groups"]
        return [rule for group in groups for rule in group["rules"]]

    wait_for("evaluation of rules", lambda: all(r["evaluationTime"] for r in evaluated()))
    assert len(evaluated()) == len(rules())
    for rule in evaluated():
        assert (rule["health"], rule.get("lastError", "")) == ("ok", ""), rule["name"]


def _empty_panels(prometheus: Prometheus) -> list[str]:
    """Return panels and variables of the dashboard without data."""
    return [
        query.where
        for query in dashboard_queries()
        if query.where not in EXPECTED_EMPTY and not prometheus.query(query.text)
    ]


def _check_commands_of_the_runbook(daemon: DaemonProcess, token: str) -> None:
    text = RUNBOOK.read_text("utf-8")
    commands = set(re.findall(r"`(curl [^`]+)`|^\$ (curl .+)$", text, re.MULTILINE))
    assert len(commands) > 2
    for command in commands:
        line = "".join(command).replace("localhost:8080", f"127.0.0.1:{daemon._port}")
        if token:
            line = line.replace("curl ", f'curl -H "Authorization: Bearer {token}" ', 1)
        if shutil.which("jq") is None:
            line = line.partition(" | jq")[0]
        result = subprocess.run(
            ["bash", "-c", f"set -o pipefail; {line.replace('curl ', 'curl --fail ', 1)}"],  # noqa: S607
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert result.returncode == 0, (line, result.stderr)
