"""The compose file: valid, with services that work together.

Where no container can run, they run here as processes, with the commands and variables of the
file; only hosts, ports and folders are changed. The schema comes from ``make deploy-check``.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from confluent_kafka.admin import AdminClient
from jsonschema import Draft202012Validator, ValidationError

from kronos_stream.daemon.config.environment import read_options, read_settings
from kronos_stream.daemon.config.reference import describe_settings
from tests.support.paths import ROOT
from tests.support.processes import WAIT_SECONDS, http_get, wait_for
from tests.support.prometheus import Prometheus

FOLDER = ROOT / "deploy/compose"
TEXT = (FOLDER / "compose.yaml").read_text("utf-8")
FILE: dict[str, Any] = yaml.safe_load(TEXT)
SERVICES: dict[str, dict[str, Any]] = FILE["services"]
OURS = ("exchange", "topics", "daemon")
PREFIX = "KRONOS_STREAM_"
PORTS = ("9000", "9092", "9093", "9094", "8080")
"""That the file names, and that something else may listen on here."""

Change = Callable[[str], str]


@pytest.fixture(scope="module")
def specification() -> Draft202012Validator:
    file = ROOT / "build/deploy/schemas/compose-spec.json"
    if not file.exists():
        if os.environ.get("KRONOS_REQUIRE_HELM") == "1":
            pytest.fail("no schema of the compose specification: make deploy-check")
        pytest.skip("compose file not checked by its schema: make deploy-check fetches it")
    return Draft202012Validator(json.loads(file.read_text("utf-8")))


def test_file_matches_the_compose_specification(specification: Draft202012Validator) -> None:
    specification.validate(FILE)
    for wrong in ("healthchek", "read_olny"):
        broken = {**FILE, "services": {"daemon": {**SERVICES["daemon"], wrong: True}}}
        with pytest.raises(ValidationError, match=wrong):
            specification.validate(broken)


def test_daemon_accepts_its_settings() -> None:
    names = {setting.name for setting in describe_settings()}
    for service in SERVICES.values():
        environment = service.get("environment", {})
        assert {name for name in environment if name.startswith("KRONOS")} <= names
        assert all(
            isinstance(value, str) for value in environment.values()
        )  # YAML has other ideas of no
    settings = read_settings(SERVICES["daemon"]["environment"])
    length = int(SERVICES["daemon"]["stop_grace_period"].removesuffix("s"))
    assert length > settings.stop_grace + max(2.0, 0.8 * 1.0)  # 1s bars: a batch has 2 s
    topics = read_options("kafka", SERVICES["topics"]["environment"])
    assert topics == settings.options["kafka"]


def test_ports_are_open_on_the_loopback_interface_only() -> None:
    for name, service in SERVICES.items():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
        assert service["cap_drop"] == ["ALL"], name
        assert "no-new-privileges:true" in service["security_opt"], name
        assert service.get("read_only", False) == (name != "kafka"), name
        assert "network_mode" not in service
        assert "privileged" not in service


def test_mounted_files_exist() -> None:
    for name, service in SERVICES.items():
        for mount in service.get("volumes", []):
            source, target, *mode = mount.split(":")
            assert target.startswith("/")
            if source.startswith("."):
                assert (FOLDER / source).is_file(), f"{name}: {source}"
                assert mode == ["ro"]
            else:
                assert source in FILE["volumes"]
    for used in ("build", "image"):
        assert len({json.dumps(SERVICES[name][used]) for name in OURS}) == 1
    build = SERVICES["daemon"]["build"]
    assert (FOLDER / build["context"] / build["dockerfile"]).is_file()
    assert f"ARG {next(iter(build['args']))}=" in (ROOT / "Dockerfile").read_text("utf-8")


def test_images_are_pinned() -> None:
    for name in SERVICES.keys() - {*OURS}:
        assert re.fullmatch(r"[\w./-]+:v?\d+\.\d+\.\d+", SERVICES[name]["image"]), name
    tested = re.search(
        r"<version>(\d+\.\d+\.\d+)<", (ROOT / "tests/support/kafka/pom.xml").read_text()
    )
    assert tested is not None
    assert SERVICES["kafka"]["image"].endswith(f":{tested[1]}")


def test_services_wait_for_their_dependencies() -> None:
    healthy = {
        name for name, service in SERVICES.items() if "test" in service.get("healthcheck", {})
    }
    assert healthy == SERVICES.keys() - {"topics", "daemon"}  # the daemon's is in its image
    for service in SERVICES.values():
        for other, how in service.get("depends_on", {}).items():
            ends = how["condition"] == "service_completed_successfully"
            assert ends or other in healthy
            assert ends == (other == "topics")


def test_grafana_and_prometheus_find_their_sources() -> None:
    (source,) = yaml.safe_load((FOLDER / "grafana/datasources.yaml").read_text("utf-8"))[
        "datasources"
    ]
    assert source["url"] == "http://prometheus:9090"
    targets = {mount.split(":")[1] for mount in SERVICES["grafana"]["volumes"]}
    (provider,) = yaml.safe_load((FOLDER / "grafana/dashboards.yaml").read_text("utf-8"))[
        "providers"
    ]
    home = SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home in targets
    assert home.startswith(provider["options"]["path"])
    ours = yaml.safe_load((FOLDER / "prometheus.yaml").read_text("utf-8"))
    usual = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yaml").read_text("utf-8"))
    assert ours["rule_files"] == usual["rule_files"]
    names = [config["job_name"] for config in ours["scrape_configs"]]
    assert names == [config["job_name"] for config in usual["scrape_configs"]]


# All of it, by hand


@pytest.fixture
def change() -> Change:
    """Replace hosts and ports of the file by those of this machine."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in PORTS]
    free = dict(zip(PORTS, (str(one.getsockname()[1]) for one in sockets), strict=True))
    for one in sockets:
        one.close()

    def changed(text: str) -> str:
        text = re.sub(rf"\b({'|'.join(SERVICES)})(?=:\d)", "127.0.0.1", text)
        return re.sub(rf"(?<![\d.])({'|'.join(PORTS)})\b", lambda found: free[found[1]], text)

    return changed


@contextmanager
def running(
    name: str, folder: Path, change: Change, *command: str, **more: str
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a service as a process, with ``command`` if given."""
    given: Mapping[str, str] = SERVICES[name].get("environment", {})
    line = [*command] or [str(Path(sys.executable).parent / "kronos-stream"), *_words(name, change)]
    environ = {k: v for k, v in os.environ.items() if not k.startswith(PREFIX)}
    environ |= {key: change(value) for key, value in given.items()} | more
    with (folder / f"{name}.log").open("ab") as log:
        process = subprocess.Popen(line, env=environ, stdout=log, stderr=log, cwd=folder)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _words(name: str, change: Change) -> list[str]:
    return [change(word) for word in SERVICES[name]["command"]]


def _kafka(folder: Path, jars: Path, change: Change) -> list[str]:
    """Command of Kafka with formatted storage, and with settings as its image makes them."""
    lines = [
        f"{name.removeprefix('KAFKA_').lower().replace('_', '.')}={change(value)}"
        for name, value in SERVICES["kafka"]["environment"].items()
    ]
    where = SERVICES["kafka"]["environment"]["KAFKA_LOG_DIRS"]
    assert f"kafka:{where}" in SERVICES["kafka"]["volumes"]
    file = folder / "server.properties"
    file.write_text("\n".join(lines).replace(where, str(folder / "kafka")), "utf-8")
    java = ["java", "-Xmx256m", "-XX:TieredStopAtLevel=1", "-cp", f"{jars}/*"]
    identity = "a3Jvbm9zLXN0cmVhbS0wMQ"
    subprocess.run(
        [*java, "kafka.tools.StorageTool", "format", "-t", identity, "-c", str(file)],
        check=True, capture_output=True, timeout=WAIT_SECONDS,
    )  # fmt: skip
    return [*java, "kafka.Kafka", str(file)]


def _healthy(name: str, change: Change) -> bool:
    kind, program, *arguments = SERVICES[name]["healthcheck"]["test"]
    assert (kind, program) == ("CMD", "python3")
    line = [sys.executable, *map(change, arguments)]
    return subprocess.run(line, capture_output=True, check=False).returncode == 0


def test_services_work_together(
    kafka_jars: Path,
    make_prometheus: Callable[[str], Prometheus],
    change: Change,
    tmp_path: Path,
) -> None:
    with ExitStack() as stack:
        exchange = stack.enter_context(running("exchange", tmp_path, change))
        kafka = _kafka(tmp_path, kafka_jars, change)
        stack.enter_context(running("kafka", tmp_path, change, *kafka))
        wait_for("the exchange is healthy", lambda: _healthy("exchange", change))
        assert exchange.poll() is None
        outside = SERVICES["kafka"]["ports"][0].rpartition(":")[0]
        admin = AdminClient({"bootstrap.servers": change(outside), "log_level": 0})
        wait_for("Kafka has started", lambda: _brokers(admin) == 1)

        with running("topics", tmp_path, change) as topics:
            assert topics.wait(WAIT_SECONDS) == 0, (tmp_path / "topics.log").read_text("utf-8")
        assert "kronos.forecasts.v1" in admin.list_topics(timeout=WAIT_SECONDS).topics

        page = change("http://daemon:8080")
        more = {
            f"{PREFIX}HTTP__PORT": page.rpartition(":")[2],
            f"{PREFIX}STATE_FILE": str(tmp_path / "state.sqlite"),
        }
        daemon = stack.enter_context(running("daemon", tmp_path, change, **more))
        wait_for("the daemon is ready", lambda: http_get(f"{page}/readyz")[0] == 200)

        text = change((FOLDER / "prometheus.yaml").read_text("utf-8"))
        rules = (ROOT / "deploy/prometheus/rules.yaml").read_text("utf-8")
        (tmp_path / "prometheus").mkdir()
        (tmp_path / "prometheus/rules.yaml").write_text(rules, "utf-8")
        with make_prometheus(text) as prometheus:
            expression = 'sum(kronos_delivered_total{job="kronos-stream", kind="forecast"})'
            wait_for(
                "Prometheus has metrics of forecasts",
                lambda: any(value > 0 for _, value in prometheus.query(expression)),
            )
            found = prometheus.api_get("rules")["groups"]
            assert len(found) == len(yaml.safe_load(rules)["groups"])

        daemon.send_signal(signal.SIGTERM)
        assert daemon.wait(WAIT_SECONDS) == 0


def _brokers(admin: AdminClient) -> int:
    try:
        return len(admin.list_topics(timeout=10).brokers)
    except Exception:  # noqa: BLE001 - it has not started yet
        return 0
