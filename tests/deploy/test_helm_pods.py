"""Pods of the Helm chart: rights, selectors, scaling, network, topics."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from random import Random

import pytest
import yaml

from kronos_connectors.kafka import topics
from kronos_connectors.kafka.feed import KafkaFeed
from kronos_stream.daemon.config.environment import read_options, read_settings
from kronos_stream.daemon.config.settings import ENV_PREFIX
from kronos_stream.interfaces.feed import FeedNeeds
from kronos_stream.market.clock import SystemClock
from kronos_stream.market.timeframe import Timeframe
from tests.support.apache_kafka import ApacheKafka
from tests.support.helm import (
    CHART,
    SECRETS,
    VALUES,
    Chart,
    Object,
    container_environment,
    kinds,
    pods,
)
from tests.support.paths import ROOT


@pytest.mark.parametrize("values", VALUES)
def test_pods_run_with_minimal_rights(chart: Chart, values: str) -> None:
    for role, _, spec in pods(chart.objects(values)):
        assert spec["enableServiceLinks"] is False
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] >= 1_000
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        (container,) = spec["containers"]
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
        assert "/tmp" in mounts  # noqa: S108 - the root is read-only
        assert ("/var/lib/kronos-stream" in mounts) == (role in {"all", "ingest"})
        if role != "topics":
            assert container["startupProbe"]["httpGet"]["path"] == "/healthz"
            assert container["livenessProbe"]["httpGet"]["path"] == "/healthz"
            assert container["readinessProbe"]["httpGet"]["path"] == "/readyz"


def test_user_is_that_of_the_image() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text("utf-8"))
    user = re.search(r"^USER (\d+):(\d+)$", (ROOT / "Dockerfile").read_text("utf-8"), re.MULTILINE)
    assert user is not None
    context = values["podSecurityContext"]
    assert [context["runAsUser"], context["runAsGroup"]] == [int(user[1]), int(user[2])]


@pytest.mark.parametrize("values", VALUES)
def test_grace_period_exceeds_a_batch_and_its_delivery(
    chart: Chart, values: str, tmp_path: Path
) -> None:
    objects = chart.objects(values)
    for role, _, spec in pods(objects):
        if role != "topics":
            settings = read_settings(container_environment(spec, objects, tmp_path / role))
            batch = 0 if role == "ingest" else settings.batch_deadline or 60
            least = batch + settings.stop_grace
            assert spec["terminationGracePeriodSeconds"] > least, role


@pytest.mark.parametrize("values", VALUES)
def test_selectors_match_their_pods(chart: Chart, values: str) -> None:
    objects = chart.objects(values)
    labels = {role: metadata["labels"] for role, metadata, _ in pods(objects)}
    roles = labels.keys() - {"topics"}
    assert roles == ({"all"} if values.startswith("all") else {"ingest", "forecast"})

    def found(selector: Object) -> set[str]:
        return {role for role, has in labels.items() if selector.items() <= has.items()}

    for one in objects:
        spec = one.get("spec", {})
        name = one["metadata"]["name"].rpartition("-")[2]
        if one["kind"] in {"StatefulSet", "Deployment", "PodDisruptionBudget"}:
            assert found(spec["selector"]["matchLabels"]) == {name}
        elif one["kind"] == "NetworkPolicy":
            assert found(spec["podSelector"]["matchLabels"]) == {name}
        elif one["kind"] == "Service":
            assert found(spec["selector"]) == {name}
        elif one["kind"] == "ServiceMonitor":
            services = kinds(objects, "Service")
            wanted = spec["selector"]["matchLabels"].items()
            assert all(wanted <= service["metadata"]["labels"].items() for service in services)


def test_pods_change_only_with_their_settings(chart: Chart) -> None:
    def annotations(*settings: str) -> dict[str, Object]:
        return {r: m.get("annotations", {}) for r, m, _ in pods(chart.objects("split", *settings))}

    before = annotations()
    assert annotations("serviceMonitor.enabled=true") == before
    symbols = annotations("symbols={binance:BTC/USDT 1m\\,5m,binance:ETH/USDT}")
    assert symbols["ingest"] != before["ingest"]
    assert symbols["forecast"] == before["forecast"]
    paths = annotations("forecast.settings.PATHS=64")
    assert paths["ingest"] == before["ingest"]
    assert paths["forecast"] != before["forecast"]


def test_gpus_are_requested_and_named_as_devices(chart: Chart, tmp_path: Path) -> None:
    objects = chart.objects("split-gpu")
    (spec,) = (spec for role, _, spec in pods(objects) if role == "forecast")
    assert spec["containers"][0]["resources"]["limits"] == {"memory": "16Gi", "nvidia.com/gpu": 2}
    assert spec["containers"][0]["image"] == "registry.example/kronos-stream:0.1.0-cuda"
    assert container_environment(spec, objects, tmp_path)[f"{ENV_PREFIX}DEVICE"] == "cuda:0,cuda:1"


def test_keda_scales_by_the_lag_of_the_consumer_group(chart: Chart, tmp_path: Path) -> None:
    objects = chart.objects("split-gpu", "symbols={binance:BTC/USDT 1m\\, 1M}")
    (scaled,) = kinds(objects, "ScaledObject")
    (deployment,) = kinds(objects, "Deployment")
    assert scaled["spec"]["scaleTargetRef"] == {"name": deployment["metadata"]["name"]}
    assert "replicas" not in deployment["spec"]
    (environ,) = (
        container_environment(s, objects, tmp_path)
        for role, _, s in pods(objects)
        if role == "forecast"
    )
    options = read_options("kafka", environ)
    lengths = read_settings(environ).timeframes
    assert [str(length) for length in lengths] == ["5m", "1h", "1m", "1M"]
    triggers = [trigger["metadata"] for trigger in scaled["spec"]["triggers"]]
    assert [trigger["topic"] for trigger in triggers] == [
        topics.candle_topic(options.topic_prefix, length) for length in lengths
    ]
    feed = KafkaFeed(options, FeedNeeds(lengths, 1), SystemClock(), Random(0))
    assert {trigger["consumerGroup"] for trigger in triggers} == {feed.group}
    assert {trigger["sasl"] for trigger in triggers} == {"scram_sha512"}
    assert scaled["spec"]["maxReplicaCount"] <= options.partitions
    (job,) = kinds(objects, "Job")
    (container,) = job["spec"]["template"]["spec"]["containers"]
    candles = container["args"][container["args"].index("--candles") + 1]
    assert [Timeframe.parse(text) for text in candles.split(",")] == [*lengths]


def test_keda_uses_the_login_of_the_daemon(chart: Chart) -> None:
    objects = chart.objects("split-gpu")
    (scaled,) = kinds(objects, "ScaledObject")
    (login,) = kinds(objects, "TriggerAuthentication")
    for trigger in scaled["spec"]["triggers"]:
        assert trigger["authenticationRef"] == {"name": login["metadata"]["name"]}
    maps = {one["metadata"]["name"]: one["data"] for one in kinds(objects, "ConfigMap")}
    found = {ref["parameter"]: SECRETS[ref["name"]][ref["key"]]
             for ref in login["spec"]["secretTargetRef"]}  # fmt: skip
    found |= {ref["parameter"]: maps[ref["name"]][ref["key"]]
              for ref in login["spec"]["configMapTargetRef"]}  # fmt: skip
    assert found == {
        "username": "kronos",
        "password": "kafka's",
        "ca": SECRETS["kafka-cluster-ca-cert"]["ca.crt"],
        "cert": SECRETS["kronos-user"]["user.crt"],
        "key": SECRETS["kronos-user"]["user.key"],
    }


@pytest.mark.parametrize(
    ("settings", "hub"),
    [
        ([], True),
        (["modelCache.offline=true"], False),
        (["forecast.settings.MODEL=nano"], False),
        (["forecast.settings.MODEL=/models/mine"], False),
    ],
)
def test_role_forecast_may_reach_kafka_and_the_hub_only(
    chart: Chart, settings: list[str], *, hub: bool
) -> None:
    def allowed(role: str) -> dict[int, Object]:
        return {
            port["port"]: rule
            for one in kinds(chart.objects("split-gpu", *settings), "NetworkPolicy")
            if one["metadata"]["name"].endswith(role)
            for rule in one["spec"]["egress"]
            for port in rule["ports"]
        }

    assert allowed("forecast").keys() == {53, 9093, 9094} | ({443} if hub else set())
    assert allowed("ingest").keys() == {53, 9093, 9094, 443}
    assert allowed("ingest")[9093]["to"] == [{"ipBlock": {"cidr": "10.20.0.0/16"}}]


def test_job_creates_the_topics(
    chart: Chart, kafka: ApacheKafka, topic_prefix: str, tmp_path: Path
) -> None:
    brokers = kafka.bootstrap.replace(",", "\\,")
    settings = {"BOOTSTRAP_SERVERS": brokers, "TOPIC_PREFIX": topic_prefix, "PARTITIONS": "5"}
    objects = chart.objects(
        "split", *(f"settings.KAFKA__{name}={value}" for name, value in settings.items())
    )
    ((_, _, spec),) = (pod for pod in pods(objects) if pod[0] == "topics")
    environ = {**os.environ, **container_environment(spec, objects, tmp_path)}
    program = partial(subprocess.run, env=environ, capture_output=True, text=True, check=False)
    command = [str(Path(sys.executable).parent / "kronos-stream")]
    arguments = spec["containers"][0]["args"]
    done = program([*command, *arguments])
    assert done.returncode == 0, done.stderr
    for length in ("1m", "5m"):
        assert (
            f"{topics.candle_topic(topic_prefix, Timeframe.parse(length))}: created" in done.stdout
        )
    checked = program([*command, "topics", "check", "--candles", "1m,5m"])
    assert checked.returncode == 0, checked.stderr
