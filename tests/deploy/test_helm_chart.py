"""The Helm chart by the tools of the trade, and its environments by the daemon's own reader.

helm, kubeconform and the schemas come from ``make deploy-check``, which runs these tests, too.
Where they are not, what needs them is skipped; with KRONOS_REQUIRE_HELM=1 it fails instead.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from itertools import chain
from math import ceil
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import pytest
import yaml
from pydantic import BaseModel, SecretStr

from kronos_connectors.ccxt.options import CcxtOptions
from kronos_connectors.kafka import topics
from kronos_connectors.kafka.feed import KafkaFeed
from kronos_connectors.kafka.options import KafkaOptions
from kronos_connectors.mqtt.options import MqttOptions
from kronos_stream.daemon.config.environment import read_options, read_settings
from kronos_stream.daemon.config.reference import describe_settings
from kronos_stream.daemon.config.settings import ENV_PREFIX, HttpSettings, Settings
from kronos_stream.interfaces.feed import FeedNeeds
from kronos_stream.market.clock import SystemClock
from kronos_stream.market.timeframe import Timeframe
from tests.support.apache_kafka import ApacheKafka
from tests.support.certificates import CertificateAuthority
from tests.support.paths import ROOT

CHART = ROOT / "deploy/kubernetes/kronos-stream"
TOOLS = ROOT / "build/deploy"
VALUES = sorted(path.name.removesuffix("-values.yaml") for path in (CHART / "ci").glob("*.yaml"))
VERSIONS = ("1.27.0", "1.37.0")
"""Of Kubernetes: the oldest that the chart allows, and the newest of which there are schemas."""

# What the Secrets hold that the values in ci/ name; certificates are made by `_certificates`.
SECRETS: dict[str, dict[str, str]] = {
    "kronos-stream": {
        f"{ENV_PREFIX}KAFKA__SASL_PASSWORD": "kafka's",
        f"{ENV_PREFIX}MQTT__PASSWORD": "mosquitto's",
        f"{ENV_PREFIX}HTTP__TOKEN": "0123456789abcdef",
    },
    "hub": {"token": "hf_"},
}

Object = dict[str, Any]


class Chart(NamedTuple):
    """What helm and kubeconform say of the chart."""

    folder: Path = CHART

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [TOOLS / "helm", *arguments], capture_output=True, text=True, check=False
        )

    def text(self, values: str, *settings: str) -> str:
        told = list(chain.from_iterable(("--set", setting) for setting in settings))
        done = self.template(values, *told)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def template(self, values: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        file = str(CHART / f"ci/{values}-values.yaml")
        place = ["x", str(self.folder), "--namespace", "bots", "--kube-version", VERSIONS[-1]]
        return self.run("template", *place, "--values", file, *arguments)

    def objects(self, values: str, *settings: str) -> list[Object]:
        return parse(self.text(values, *settings))


def parse(text: str) -> list[Object]:
    """The objects in it; by libyaml if it is there, as the dashboard is long."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return [one for one in yaml.load_all(text, loader) if one]


@pytest.fixture(scope="session")
def chart() -> Chart:
    if not (TOOLS / ".complete").exists():
        if os.environ.get("KRONOS_REQUIRE_HELM") == "1":
            pytest.fail("no helm and kubeconform: make deploy-check")
        pytest.skip("not tested with helm and kubeconform: make deploy-check fetches them")
    return Chart()


@pytest.fixture(scope="session", autouse=True)
def _certificates(tmp_path_factory: pytest.TempPathFactory) -> None:
    authority = CertificateAuthority(tmp_path_factory.mktemp("certificates"))
    ours = authority.issue("kronos")
    SECRETS["kafka-cluster-ca-cert"] = {"ca.crt": authority.file.read_text("utf-8")}
    SECRETS["kronos-user"] = {
        "user.crt": ours.certificate.read_text("utf-8"),
        "user.key": ours.key.read_text("utf-8"),
        "user.p12": "other things",
    }


def conform(text: str, version: str) -> tuple[dict[str, int], str]:
    """How many objects are valid and how many are not, and what is said of those."""
    places = "{{.NormalizedKubernetesVersion}}/", ""
    schemas = [
        f"{TOOLS}/schemas/{at}{{{{.ResourceKind}}}}{{{{.KindSuffix}}}}.json" for at in places
    ]
    locations = chain.from_iterable(("-schema-location", schema) for schema in schemas)
    options = ["-strict", "-summary", "-output", "json", "-kubernetes-version", version]
    done = subprocess.run(
        [TOOLS / "kubeconform", *options, *locations, "-"],
        input=text, capture_output=True, text=True, check=False,
    )  # fmt: skip
    answer = json.loads(done.stdout)
    assert (done.returncode == 0) == (not answer["resources"])
    return answer["summary"], done.stdout


def kinds(objects: list[Object], *wanted: str) -> list[Object]:
    return [one for one in objects if one["kind"] in wanted]


def pods(objects: list[Object]) -> Iterator[tuple[str, Object, Object]]:
    """Each pod's role, its metadata and its spec."""
    for one in kinds(objects, "StatefulSet", "Deployment", "Job"):
        template = one["spec"]["template"]
        role = template["metadata"]["labels"]["app.kubernetes.io/component"]
        yield role, template["metadata"], template["spec"]


# What a kubelet would do: give a container its variables and its files.


def told(spec: Object, objects: list[Object], folder: Path) -> dict[str, str]:
    """The container's environment; paths in it lead to where its volumes are now, in ``folder``."""
    (container,) = spec["containers"]
    maps = {one["metadata"]["name"]: one["data"] for one in kinds(objects, "ConfigMap")}
    environ: dict[str, str] = {}
    for source in container.get("envFrom", []):
        ((kind, reference),) = source.items()
        environ |= (maps if kind == "configMapRef" else SECRETS)[reference["name"]]
    for variable in container.get("env", []):
        environ[variable["name"]] = variable.get("value") or _resolve(variable, container)
    volumes = {volume.pop("name"): volume for volume in map(dict, spec["volumes"])}
    for mount in container["volumeMounts"]:
        place = folder / mount["mountPath"].strip("/").replace("/", "-")
        place.mkdir(parents=True)
        volume = volumes.get(mount["name"], {})
        for name, text in _files(volume, maps).items():
            (place / name).write_text(text, "utf-8")
        under = re.compile(rf"{re.escape(mount['mountPath'])}(?=/|$)")
        environ = {name: under.sub(str(place), value) for name, value in environ.items()}
    return environ


def _resolve(variable: Object, container: Object) -> str:
    if field := variable["valueFrom"].get("resourceFieldRef"):
        assert field["resource"] == "requests.cpu"
        cores = container["resources"]["requests"]["cpu"]
        milli = int(cores[:-1]) if cores.endswith("m") else 1_000 * float(cores)
        return str(ceil(milli / 1_000))
    reference = variable["valueFrom"]["secretKeyRef"]
    return SECRETS[reference["name"]][reference["key"]]


def _files(volume: Object, maps: dict[str, dict[str, str]]) -> dict[str, str]:
    if "configMap" in volume:
        return maps[volume["configMap"]["name"]]
    if "secret" not in volume:
        return {}
    keys = SECRETS[volume["secret"]["secretName"]]
    items = volume["secret"].get("items", [{"key": key, "path": key} for key in keys])
    return {item["path"]: keys[item["key"]] for item in items}


# Of the chart's form


@pytest.mark.parametrize("values", VALUES)
def test_chart_is_well_formed(chart: Chart, values: str) -> None:
    file = str(CHART / f"ci/{values}-values.yaml")
    version = ["--kube-version", VERSIONS[-1]]
    done = chart.run("lint", "--strict", *version, "--values", file, str(CHART))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[WARNING]" not in done.stdout
    assert "[ERROR]" not in done.stdout


@pytest.mark.parametrize("version", VERSIONS)
def test_objects_are_what_the_server_takes(chart: Chart, version: str) -> None:
    text = "\n---\n".join(map(chart.text, VALUES))
    summary, said = conform(text, version)
    count = len(re.findall(r"^kind:", text, re.MULTILINE))
    assert count > 40
    assert summary == {"valid": count, "invalid": 0, "errors": 0, "skipped": 0}, said


def test_the_check_finds_what_is_wrong(chart: Chart) -> None:
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
    _, said = conform(text, VERSIONS[-1])
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
        assert word in said, word


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
def test_values_that_cannot_work_are_refused(chart: Chart, setting: str, why: str) -> None:
    done = chart.template("split", "--set", setting)
    assert done.returncode != 0
    assert why in done.stderr


def test_sinks_of_all_roles_are_none_of_ingest(chart: Chart, tmp_path: Path) -> None:
    settings = (
        "settings.SINKS=jsonl",
        "settings.JSONL__PATH=x.jsonl",
        "forecast.settings.SINKS=null",
    )
    objects = chart.objects("split", *settings)
    read = {role: read_settings(told(spec, objects, tmp_path / role))
            for role, _, spec in pods(objects) if role != "topics"}  # fmt: skip
    assert {role: settings.sinks for role, settings in read.items()} == {
        "ingest": (), "forecast": ("jsonl",)
    }  # fmt: skip


def test_an_upgrade_may_have_a_pod_more_than_partitions(chart: Chart) -> None:
    objects = chart.objects("split", "forecast.replicas=32")
    (deployment,) = kinds(objects, "Deployment")
    assert deployment["spec"]["replicas"] == 32
    assert deployment["spec"]["strategy"]["rollingUpdate"]["maxSurge"] == 1


def test_what_the_chart_takes_for_defaults_are_the_daemons() -> None:
    text = (CHART / "templates/deployment.yaml").read_text("utf-8")
    lookback = Settings.model_fields["lookback"].default
    assert set(re.findall(r"LOOKBACK \| default (\d+)", text)) == {str(lookback)}
    partitions = KafkaOptions.model_fields["partitions"].default
    assert set(re.findall(r"PARTITIONS \| default (\d+)", text)) == {str(partitions)}


def test_chart_without_values_says_what_it_needs(chart: Chart) -> None:
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


# Of what the daemon is told


@pytest.mark.parametrize("values", VALUES)
def test_daemon_takes_its_environment(chart: Chart, values: str, tmp_path: Path) -> None:
    objects = chart.objects(values)
    asked = yaml.safe_load((CHART / f"ci/{values}-values.yaml").read_text("utf-8"))
    names = {setting.name for setting in describe_settings()}
    for role, _, spec in pods(objects):
        environ = told(spec, objects, tmp_path / role)
        ours = {name for name in environ if name.startswith(ENV_PREFIX)}
        assert ours <= names, role
        if role == "topics":
            read_options("kafka", environ)
            continue
        settings = read_settings(environ)
        assert settings.role == role
        assert settings.http.host == "0.0.0.0"  # noqa: S104 - of a pod
        assert settings.http.port == spec["containers"][0]["ports"][0]["containerPort"]
        wanted = {**asked.get("settings", {}), **asked.get(role, {}).get("settings", {})}
        for name, value in wanted.items():
            given = environ[ENV_PREFIX + name]
            assert given == (str(value).lower() if isinstance(value, bool) else str(value))
        if role != "forecast":
            assert len(settings.watchlist()) == len(asked["symbols"])


@pytest.mark.parametrize("number", range(3))
def test_values_in_the_docs_can_be_installed(chart: Chart, number: int, tmp_path: Path) -> None:
    text = (ROOT / "docs/kubernetes.md").read_text("utf-8")
    blocks = re.findall(r"^```yaml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    (tmp_path / "values.yaml").write_text(blocks[number], "utf-8")
    done = chart.template("all", "--values", str(tmp_path / "values.yaml"))
    assert done.returncode == 0, done.stderr
    summary, said = conform(done.stdout, VERSIONS[-1])
    assert summary["valid"] > 5, said
    assert summary["invalid"] == summary["errors"] == summary["skipped"] == 0, said
    objects = parse(done.stdout)
    for role, _, spec in pods(objects):
        environ = told(spec, objects, tmp_path / role)
        if role != "topics":
            read_settings(environ)


def test_secrets_are_read_from_files_and_from_variables(chart: Chart, tmp_path: Path) -> None:
    for way in ("files", "env"):
        objects = chart.objects("split-gpu", f"secrets.as={way}")
        for role, _, spec in pods(objects):
            environ = told(spec, objects, tmp_path / way / role)
            assert (f"{ENV_PREFIX}KAFKA__SASL_PASSWORD" in environ) == (way == "env")
            options = read_options("kafka", environ)
            assert options.sasl_password.get_secret_value() == "kafka's"
            assert options.security_protocol == "SASL_SSL"
            assert options.ssl_cafile.name == "ca.crt"
            assert options.ssl_keyfile.name == "user.key"


def test_what_is_secret_is_kept_out_of_settings(chart: Chart) -> None:
    models: dict[str, type[BaseModel]] = {
        "": Settings,
        "HTTP__": HttpSettings,
        "KAFKA__": KafkaOptions,
    }
    models |= {"MQTT__": MqttOptions, "CCXT__": CcxtOptions}
    secret = {
        prefix + name.upper()
        for prefix, model in models.items()
        for name, field in model.model_fields.items()
        if SecretStr in {field.annotation, *getattr(field.annotation, "__args__", ())}
    }
    assert len(secret) >= 4
    for name in secret:
        done = chart.template("all", "--set", f"settings.{name}=hunter2")
        assert f"settings.{name} is a secret" in done.stderr


def test_numbers_and_truths_arrive_as_they_were_written(chart: Chart) -> None:
    settings = ["KAFKA__MAX_RECORD_BYTES=12345678", "TOP_P=0.95", "ANCHOR=false", "SEED=0"]
    objects = chart.objects("all", *(f"all.settings.{setting}" for setting in settings))
    (data,) = (one["data"] for one in kinds(objects, "ConfigMap") if "symbols" not in one["data"])
    for name, _, value in (setting.partition("=") for setting in settings):
        assert data[ENV_PREFIX + name] == value


def test_threads_follow_from_what_is_requested(chart: Chart, tmp_path: Path) -> None:
    def threads(folder: str, *settings: str) -> str | None:
        objects = chart.objects("split", *settings)
        (spec,) = (spec for role, _, spec in pods(objects) if role == "forecast")
        return told(spec, objects, tmp_path / folder).get(f"{ENV_PREFIX}THREADS")

    assert threads("set") == "2"
    without = "forecast.settings.THREADS=null"
    assert threads("requested", without, "forecast.resources.requests.cpu=3500m") == "4"
    assert threads("gpu", without, "forecast.gpus=1") is None
    assert threads("none", without, "forecast.resources.requests.cpu=null") is None


# Of pods


@pytest.mark.parametrize("values", VALUES)
def test_pods_may_do_no_more_than_they_must(chart: Chart, values: str) -> None:
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


def test_user_is_the_images() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text("utf-8"))
    user = re.search(r"^USER (\d+):(\d+)$", (ROOT / "Dockerfile").read_text("utf-8"), re.MULTILINE)
    assert user is not None
    context = values["podSecurityContext"]
    assert [context["runAsUser"], context["runAsGroup"]] == [int(user[1]), int(user[2])]


@pytest.mark.parametrize("values", VALUES)
def test_a_pod_is_given_longer_than_a_batch_and_its_delivery(
    chart: Chart, values: str, tmp_path: Path
) -> None:
    objects = chart.objects(values)
    for role, _, spec in pods(objects):
        if role != "topics":
            settings = read_settings(told(spec, objects, tmp_path / role))
            batch = 0 if role == "ingest" else settings.batch_deadline or 60
            least = batch + settings.stop_grace
            assert spec["terminationGracePeriodSeconds"] > least, role


@pytest.mark.parametrize("values", VALUES)
def test_whatever_selects_pods_finds_them(chart: Chart, values: str) -> None:
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


def test_what_changes_pods(chart: Chart) -> None:
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


def test_gpus_are_asked_for_and_named(chart: Chart, tmp_path: Path) -> None:
    objects = chart.objects("split-gpu")
    (spec,) = (spec for role, _, spec in pods(objects) if role == "forecast")
    assert spec["containers"][0]["resources"]["limits"] == {"memory": "16Gi", "nvidia.com/gpu": 2}
    assert spec["containers"][0]["image"] == "registry.example/kronos-stream:0.1.0-cuda"
    assert told(spec, objects, tmp_path)[f"{ENV_PREFIX}DEVICE"] == "cuda:0,cuda:1"


# Of scaling, and of who may speak to whom


def test_keda_watches_the_lag_of_the_group(chart: Chart, tmp_path: Path) -> None:
    objects = chart.objects("split-gpu", "symbols={binance:BTC/USDT 1m\\, 1M}")
    (scaled,) = kinds(objects, "ScaledObject")
    (deployment,) = kinds(objects, "Deployment")
    assert scaled["spec"]["scaleTargetRef"] == {"name": deployment["metadata"]["name"]}
    assert "replicas" not in deployment["spec"]
    (environ,) = (told(s, objects, tmp_path) for role, _, s in pods(objects) if role == "forecast")
    options = read_options("kafka", environ)
    lengths = read_settings(environ).timeframes
    assert [str(length) for length in lengths] == ["5m", "1h", "1m", "1M"]
    triggers = [trigger["metadata"] for trigger in scaled["spec"]["triggers"]]
    assert [trigger["topic"] for trigger in triggers] == [
        topics.candle_topic(options.topic_prefix, length) for length in lengths
    ]
    feed = KafkaFeed(options, FeedNeeds(lengths, 1), SystemClock(), Random(0))
    assert {trigger["consumerGroup"] for trigger in triggers} == {feed._group}
    assert {trigger["sasl"] for trigger in triggers} == {"scram_sha512"}
    assert scaled["spec"]["maxReplicaCount"] <= options.partitions
    (job,) = kinds(objects, "Job")
    (container,) = job["spec"]["template"]["spec"]["containers"]
    asked = container["args"][container["args"].index("--candles") + 1]
    assert [Timeframe.parse(text) for text in asked.split(",")] == [*lengths]


def test_keda_logs_in_as_the_daemon_does(chart: Chart) -> None:
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
def test_forecasters_reach_kafka_and_the_hub_alone(
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
    environ = {**os.environ, **told(spec, objects, tmp_path)}
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
