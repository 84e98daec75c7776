"""Environment of the containers of the Helm chart, as the daemon reads it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel, SecretStr

from kronos_connectors.ccxt.options import CcxtOptions
from kronos_connectors.kafka.options import KafkaOptions
from kronos_connectors.mqtt.options import MqttOptions
from kronos_stream.daemon.config.environment import read_options, read_settings
from kronos_stream.daemon.config.reference import describe_settings
from kronos_stream.daemon.config.settings import ENV_PREFIX, HttpSettings, Settings
from tests.support.helm import (
    CHART,
    VALUES,
    VERSIONS,
    Chart,
    conform,
    container_environment,
    kinds,
    parse,
    pods,
)
from tests.support.paths import ROOT


@pytest.mark.parametrize("values", VALUES)
def test_daemon_accepts_its_environment(chart: Chart, values: str, tmp_path: Path) -> None:
    objects = chart.objects(values)
    given_values = yaml.safe_load((CHART / f"ci/{values}-values.yaml").read_text("utf-8"))
    names = {setting.name for setting in describe_settings()}
    for role, _, spec in pods(objects):
        environ = container_environment(spec, objects, tmp_path / role)
        ours = {name for name in environ if name.startswith(ENV_PREFIX)}
        assert ours <= names, role
        if role == "topics":
            read_options("kafka", environ)
            continue
        settings = read_settings(environ)
        assert settings.role == role
        assert settings.http.host == "0.0.0.0"  # noqa: S104 - of a pod
        assert settings.http.port == spec["containers"][0]["ports"][0]["containerPort"]
        wanted = {
            **given_values.get("settings", {}),
            **given_values.get(role, {}).get("settings", {}),
        }
        for name, value in wanted.items():
            given = environ[ENV_PREFIX + name]
            assert given == (str(value).lower() if isinstance(value, bool) else str(value))
        if role != "forecast":
            assert len(settings.watchlist()) == len(given_values["symbols"])


@pytest.mark.parametrize("number", range(3))
def test_values_of_the_docs_can_be_installed(chart: Chart, number: int, tmp_path: Path) -> None:
    text = (ROOT / "docs/kubernetes.md").read_text("utf-8")
    blocks = re.findall(r"^```yaml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    (tmp_path / "values.yaml").write_text(blocks[number], "utf-8")
    done = chart.template("all", "--values", str(tmp_path / "values.yaml"))
    assert done.returncode == 0, done.stderr
    summary, output = conform(done.stdout, VERSIONS[-1])
    assert summary["valid"] > 5, output
    assert summary["invalid"] == summary["errors"] == summary["skipped"] == 0, output
    objects = parse(done.stdout)
    for role, _, spec in pods(objects):
        environ = container_environment(spec, objects, tmp_path / role)
        if role != "topics":
            read_settings(environ)


def test_secrets_are_read_from_files_or_variables(chart: Chart, tmp_path: Path) -> None:
    for way in ("files", "env"):
        objects = chart.objects("split-gpu", f"secrets.as={way}")
        for role, _, spec in pods(objects):
            environ = container_environment(spec, objects, tmp_path / way / role)
            assert (f"{ENV_PREFIX}KAFKA__SASL_PASSWORD" in environ) == (way == "env")
            options = read_options("kafka", environ)
            assert options.sasl_password.get_secret_value() == "kafka's"
            assert options.security_protocol == "SASL_SSL"
            assert options.ssl_cafile.name == "ca.crt"
            assert options.ssl_keyfile.name == "user.key"


def test_secrets_in_settings_are_rejected(chart: Chart) -> None:
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


def test_numbers_and_booleans_are_passed_unchanged(chart: Chart) -> None:
    settings = ["KAFKA__MAX_RECORD_BYTES=12345678", "TOP_P=0.95", "ANCHOR=false", "SEED=0"]
    objects = chart.objects("all", *(f"all.settings.{setting}" for setting in settings))
    (data,) = (one["data"] for one in kinds(objects, "ConfigMap") if "symbols" not in one["data"])
    for name, _, value in (setting.partition("=") for setting in settings):
        assert data[ENV_PREFIX + name] == value


def test_threads_follow_the_requested_cpus(chart: Chart, tmp_path: Path) -> None:
    def threads(folder: str, *settings: str) -> str | None:
        objects = chart.objects("split", *settings)
        (spec,) = (spec for role, _, spec in pods(objects) if role == "forecast")
        return container_environment(spec, objects, tmp_path / folder).get(f"{ENV_PREFIX}THREADS")

    assert threads("set") == "2"
    without = "forecast.settings.THREADS=null"
    assert threads("requested", without, "forecast.resources.requests.cpu=3500m") == "4"
    assert threads("gpu", without, "forecast.gpus=1") is None
    assert threads("none", without, "forecast.resources.requests.cpu=null") is None
