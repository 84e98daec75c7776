"""Form of the Helm chart: validity of its objects, invalid values, defaults, documentation.

helm, kubeconform and the schemas come from ``make deploy-check``, which also runs these tests.
Without them the tests are skipped, or fail with KRONOS_REQUIRE_HELM=1.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from kronos_connectors.kafka.options import KafkaOptions
from kronos_stream.daemon.config.environment import read_settings
from kronos_stream.daemon.config.settings import Settings
from tests.support.helm import (
    CHART,
    VALUES,
    VERSIONS,
    Chart,
    Object,
    conform,
    container_environment,
    kinds,
    pods,
)
from tests.support.paths import ROOT


@pytest.mark.parametrize("values", VALUES)
def test_chart_is_well_formed(chart: Chart, values: str) -> None:
    file = str(CHART / f"ci/{values}-values.yaml")
    version = ["--kube-version", VERSIONS[-1]]
    done = chart.run("lint", "--strict", *version, "--values", file, str(CHART))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[WARNING]" not in done.stdout
    assert "[ERROR]" not in done.stdout


@pytest.mark.parametrize("version", VERSIONS)
def test_objects_match_the_schemas_of_kubernetes(chart: Chart, version: str) -> None:
    text = "\n---\n".join(map(chart.text, VALUES))
    summary, output = conform(text, version)
    count = len(re.findall(r"^kind:", text, re.MULTILINE))
    assert count > 40
    assert summary == {"valid": count, "invalid": 0, "errors": 0, "skipped": 0}, output


def test_schema_check_finds_faults(chart: Chart) -> None:
    faults = {
        "fsGroup:": "fsGruop:",
        "publishNotReadyAddresses: true": "publishNotReadyAddresses: 'yes'",
        "lagThreshold:": "lagThreshold: 5\n        lag:",
        "maxReplicaCount: 16": "maxReplicaCount: many",
        "parameter: password,": "parametre: password,",
        "jobLabel:": "job:",
        "runbook_url: ": "runbook_url: [] #",
        "maxUnavailable: 1\n  unhealthy": "maxUnavailabel: 1\n  unhealthy",
    }
    text = chart.text("split-gpu")
    for right, wrong in faults.items():
        assert right in text
        text = text.replace(right, wrong)
    _, output = conform(text, VERSIONS[-1])
    for word in (
        "'fsGruop' not allowed",
        "/publishNotReadyAddresses",
        "/lagThreshold",
        "/maxReplicaCount",
        "'parametre' not allowed",
        "'job' not allowed",
        "/runbook_url",
        "'maxUnavailabel' not allowed",
    ):
        assert word in output, word


@pytest.mark.parametrize(
    ("setting", "why"),
    [
        ("mode=both", "at '/mode'"),
        ("modes=all", "additional properties 'modes' not allowed"),
        ("http.port=80", "at '/http/port'"),
        ("ingest.replicas=3", "at '/ingest/replicas'"),
        ("forecast.autoscaling.max=3", "additional properties 'max' not allowed"),
        ("forecast.gpus=-1", "at '/forecast/gpus'"),
        ("all.gpu=1", "additional properties 'gpu' not allowed"),
        ("settings.log__format=json", "'log__format' does not match"),
        ("settings.KRONOS_STREAM_MODEL=nano", "invalid propertyName 'KRONOS_STREAM_MODEL'"),
        ("symbols={BTC/USDT}", "at '/symbols/0'"),
        ("timeframes={5min}", "at '/timeframes/0'"),
        ("secrets.as=variables", "at '/secrets/as'"),
        ("persistence.accessModes={ReadWriteMany}", "at '/persistence/accessModes/0'"),
        ("podSecurityContext.runAsUser=0", "at '/podSecurityContext/runAsUser'"),
        ("image.digest=sha256:00", "at '/image/digest'"),
        ("forecast.resources.limits.cpu=much", "at '/forecast/resources/limits/cpu'"),
        ("image.repository=", "where is your build"),
        ("symbols=null", "symbols is empty"),
        ("settings.ROLE=forecast", "settings.ROLE is for the chart to set"),
        ("forecast.settings.KAFKA__SASL_PASSWORD=x", "KAFKA__SASL_PASSWORD is a secret"),
        ("settings.KAFKA__BOOTSTRAP_SERVERS=", "where are the brokers"),
        ("terminationGracePeriodSeconds=80", "must exceed 80"),
        ("forecast.settings.BATCH_DEADLINE=7.2,terminationGracePeriodSeconds=28", "must exceed 28"),
        ("forecast.replicas=33", "33 pods, but"),
        ("forecast.autoscaling.enabled=true,forecast.autoscaling.maxReplicas=40", "40 pods, but"),
        ("forecast.autoscaling.minReplicas=9", "minReplicas exceeds maxReplicas"),
        ("settings.KAFKA__PARTITIONS=abc", "KAFKA__PARTITIONS=abc: must be a whole number"),
        ("settings.KAFKA__PARTITIONS=0", "KAFKA__PARTITIONS=0: must be a whole number"),
        ("settings.KAFKA__PARTITIONS=5.5", "KAFKA__PARTITIONS=5.5: must be a whole number"),
        ("forecast.settings.KAFKA__PARTITIONS=64", "set it in settings, for all roles"),
        ("ingest.settings.KAFKA__TOPIC_PREFIX=mine", "set it in settings, for all roles"),
        ("forecast.settings.KAFKA__BOOTSTRAP_SERVERS=k:9092", "set it in settings, for all roles"),
        ("ingest.settings.SINKS=kafka", "set forecast.settings.SINKS"),
        ("ingest.settings.LOOKBACK=95", "fetches 95 bars of history, and forecast wants 96"),
        ("forecast.settings.LOOKBACK=489", "fetches 488 bars of history, and forecast wants 489"),
        (
            "forecast.autoscaling.enabled=true,settings.KAFKA__SECURITY_PROTOCOL=SASL_SSL",
            "KEDA reads the password",
        ),
    ],
)  # fmt: skip
def test_invalid_values_are_rejected(chart: Chart, setting: str, why: str) -> None:
    done = chart.template("split", "--set", setting)
    assert done.returncode != 0
    assert why in done.stderr


def test_role_ingest_has_no_sinks(chart: Chart, tmp_path: Path) -> None:
    settings = (
        "settings.SINKS=jsonl",
        "settings.JSONL__PATH=x.jsonl",
        "forecast.settings.SINKS=null",
    )
    objects = chart.objects("split", *settings)
    read = {role: read_settings(container_environment(spec, objects, tmp_path / role))
            for role, _, spec in pods(objects) if role != "topics"}  # fmt: skip
    assert {role: settings.sinks for role, settings in read.items()} == {
        "ingest": (), "forecast": ("jsonl",)
    }  # fmt: skip


def test_upgrade_may_start_one_pod_more_than_partitions(chart: Chart) -> None:
    objects = chart.objects("split", "forecast.replicas=32")
    (deployment,) = kinds(objects, "Deployment")
    assert deployment["spec"]["replicas"] == 32
    assert deployment["spec"]["strategy"]["rollingUpdate"]["maxSurge"] == 1


def test_defaults_of_the_chart_are_those_of_the_daemon() -> None:
    text = (CHART / "templates/deployment.yaml").read_text("utf-8")
    lookback = Settings.model_fields["lookback"].default
    assert set(re.findall(r"LOOKBACK \| default (\d+)", text)) == {str(lookback)}
    partitions = KafkaOptions.model_fields["partitions"].default
    assert set(re.findall(r"PARTITIONS \| default (\d+)", text)) == {str(partitions)}


def test_chart_without_values_names_required_ones(chart: Chart) -> None:
    done = chart.run("template", "x", str(CHART), "--kube-version", VERSIONS[-1])
    assert done.returncode != 0
    needed = ("image.repository: where is", "symbols is empty", "where are the brokers")
    assert any(words in done.stderr for words in needed)


def test_packaged_chart_has_alerts_and_dashboard(chart: Chart, tmp_path: Path) -> None:
    done = chart.run("package", str(CHART), "--destination", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (package,) = tmp_path.glob("*.tgz")
    objects = Chart(package).objects("split-gpu")
    assert objects == chart.objects("split-gpu")
    (rule,) = kinds(objects, "PrometheusRule")
    assert rule["spec"] == yaml.safe_load(
        (ROOT / "deploy/prometheus/rules.yaml").read_text("utf-8")
    )
    (board,) = (one for one in objects if one["metadata"]["name"].endswith("-dashboard"))
    ours = json.loads((ROOT / "deploy/grafana/kronos-stream.json").read_text("utf-8"))
    assert json.loads(board["data"]["kronos-stream.json"]) == ours


def test_table_of_values_is_up_to_date() -> None:
    script = ROOT / "deploy/kubernetes/values_table.py"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, check=False)
    assert done.returncode == 0, done.stdout
    text = (CHART / "README.md").read_text("utf-8")
    rows = set(re.findall(r"^\| `([\w.]+)` \|", text, re.MULTILINE))

    def unexplained(values: Object, *path: str) -> Iterator[str]:
        for name, value in values.items():
            here = ".".join((*path, name))
            if here in rows and not any(row.startswith(f"{here}.") for row in rows):
                continue
            if isinstance(value, dict) and value:
                yield from unexplained(value, *path, name)
            else:
                yield here

    values = yaml.safe_load((CHART / "values.yaml").read_text("utf-8"))
    assert list(unexplained(values)) == []
    schema = json.loads((CHART / "values.schema.json").read_text("utf-8"))
    assert schema["properties"].keys() - {"global"} == values.keys()
