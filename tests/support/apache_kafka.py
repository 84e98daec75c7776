"""Apache Kafka: a cluster of one or several nodes from a folder of jars.

Needs Java 17. The jars are those of ``org.apache.kafka:kafka_2.13`` and its dependencies, or the
folder ``libs`` of a Kafka distribution. Each node is broker and controller (KRaft), takes about
350 MB and starts in two to four seconds. All calls block; from a coroutine use a thread.
"""

from __future__ import annotations

import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from confluent_kafka import KafkaException, Producer

from tests.support.certificates import CertificateFiles
from tests.support.managed_process import Closeable, ManagedProcess, ServerProcess
from tests.support.ports import free_ports
from tests.support.processes import ProcessFailed

_CLUSTER_ID = "a3Jvbm9zLXN0cmVhbS0wMQ"  # any 16 bytes in base64
_JVM_OPTIONS = (
    *("-Xms64m", "-Xmx256m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"),
    *("-Dlog4j2.level=WARN", "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn"),
)
_SETTINGS = {
    "auto.create.topics.enable": "false",
    "group.initial.rebalance.delay.ms": "0",
    "offsets.topic.num.partitions": "4",
    "log.cleaner.dedupe.buffer.size": "4194304",  # by default half of our heap
    "log.index.size.max.bytes": "1048576",
    # Kafka detects a killed node within seconds, which keeps tests of failover short.
    "broker.heartbeat.interval.ms": "500",
    "broker.session.timeout.ms": "3000",
}


@dataclass(frozen=True, slots=True)
class KafkaListener:
    """An additional listener of each node, at another port."""

    tls: CertificateFiles | None = None
    """Certificate of the broker; clients must then use TLS."""
    client_ca_file: Path | None = None
    """PEM file of the authority that signs client certificates, which are then required."""
    mechanisms: Sequence[str] = ()
    """SASL mechanisms that clients may log in with: PLAIN, SCRAM-SHA-256, SCRAM-SHA-512."""

    @property
    def security_protocol(self) -> str:
        """Kafka's name, as in ``security.protocol``."""
        encryption = "SSL" if self.tls else "PLAINTEXT"
        return f"SASL_{encryption}" if self.mechanisms else encryption


class _Node(ServerProcess):
    """One node of a cluster, with its folder and its ports."""

    def __init__(
        self, folder: Path, jars: Path, ports: Sequence[int], cluster: list[_Node]
    ) -> None:
        super().__init__(folder / "server.log")
        self.folder, self._jars, self._cluster = folder, jars, cluster
        self.client, self.internal, self.controller, *self.others = ports
        self.settings_file = folder / "server.properties"

    def java(self, *command: str | Path) -> Sequence[str | Path]:
        return ["java", *_JVM_OPTIONS, "-cp", f"{self._jars}/*", *command, self.settings_file]

    def _command(self) -> Sequence[str | Path]:
        return self.java("kafka.Kafka")

    def _is_ready(self) -> bool:
        return _broker_count(self.internal) >= sum(node.running for node in self._cluster)


class ApacheKafka(Closeable):
    """A cluster in ``folder``, running from :meth:`start` to :meth:`close`, or in a ``with`` block.

    jars: folder of Kafka's jars.
    users: passwords by name; clients must then log in by SASL/PLAIN (without TLS).
    listeners: additional listeners by name, for the same users; see :meth:`bootstrap_for`.
    super_users: names of users with all rights; access rules then apply to the others.
    settings: lines of ``server.properties`` that replace ours or Kafka's.
    """

    def __init__(
        self,
        jars: Path,
        folder: Path,
        nodes: int = 1,
        *,
        users: Mapping[str, str] | None = None,
        listeners: Mapping[str, KafkaListener] | None = None,
        super_users: Sequence[str] = (),
        settings: Mapping[str, str] | None = None,
    ) -> None:
        if shutil.which("java") is None:
            raise ProcessFailed("no java on PATH: Kafka needs Java 17 or later")
        if not any(jars.glob("kafka_2.13-*.jar")):
            raise ProcessFailed(f"{jars}: no kafka_2.13 jar there")
        self._users, self._listeners = dict(users or {}), dict(listeners or {})
        count = 3 + len(self._listeners)
        ports = free_ports(count * nodes)
        self._nodes: list[_Node] = []
        for n in range(nodes):
            own_ports = ports[n * count : (n + 1) * count]
            self._nodes.append(_Node(folder / f"node-{n}", jars, own_ports, self._nodes))
        self.bootstrap = ",".join(f"127.0.0.1:{node.client}" for node in self._nodes)
        """Addresses for ``bootstrap.servers``; restarts keep them."""
        for node in self._nodes:
            self._configure(node, _authorizer_properties(super_users) | dict(settings or {}))

    @property
    def pids(self) -> list[int]:
        return [node.pid for node in self._nodes]

    def bootstrap_for(self, listener: str) -> str:
        """Addresses for ``bootstrap.servers`` of an additional listener."""
        place = [*self._listeners].index(listener)
        return ",".join(f"127.0.0.1:{node.others[place]}" for node in self._nodes)

    def start(self, *numbers: int) -> None:
        """Start nodes (all without a number), and wait until they serve. Raises ProcessFailed.

        Data of an earlier run in the folder are kept.
        """
        nodes = list(self._select(numbers))
        with ExitStack() as undo:
            for node in nodes:
                undo.callback(node.kill)
            self._format([node for node in nodes if not (node.folder / "data").exists()])
            for node in nodes:
                node.launch()
            for node in nodes:
                node.wait_until_ready()
            undo.pop_all()

    def kill(self, *numbers: int) -> None:
        """End nodes (all without a number) with SIGKILL."""
        for node in self._select(numbers):
            node.kill()

    def stop(self, *numbers: int) -> None:
        """End nodes (all without a number) in order, and by force if that takes too long."""
        for node in self._select(numbers):
            node.terminate()
        for node in self._select(numbers):
            node.stop()

    def freeze(self, *numbers: int) -> None:
        """Suspend nodes (all without a number): connections stay open, but they answer nothing."""
        for node in self._select(numbers):
            node.freeze()

    def thaw(self, *numbers: int) -> None:
        """Continue nodes (all without a number) after :meth:`freeze`."""
        for node in self._select(numbers):
            node.thaw()

    def close(self) -> None:
        """End all nodes with SIGKILL; their folders remain."""
        self.kill()

    def node_at_port(self, port: int) -> int:
        """Number of the node that clients reach at ``port``."""
        return [node.client for node in self._nodes].index(port)

    def __enter__(self) -> Self:
        self.start()
        return self

    def _select(self, numbers: Sequence[int]) -> Iterator[_Node]:
        return (self._nodes[n] for n in numbers or range(len(self._nodes)))

    def _configure(self, node: _Node, settings: Mapping[str, str]) -> None:
        copies = str(min(3, len(self._nodes)))
        listeners = {
            "CLIENT": (node.client, KafkaListener(mechanisms=["PLAIN"] if self._users else [])),
            "INTERNAL": (node.internal, KafkaListener()),
            "CONTROLLER": (node.controller, KafkaListener()),
        }
        for port, (name, listener) in zip(node.others, self._listeners.items(), strict=True):
            listeners[name.upper()] = port, listener
        entries = {
            "process.roles": "broker,controller",
            "node.id": str(self._nodes.index(node) + 1),
            "controller.quorum.voters": ",".join(
                f"{i}@127.0.0.1:{peer.controller}" for i, peer in enumerate(self._nodes, 1)
            ),
            "listeners": ",".join(
                f"{name}://127.0.0.1:{port}" for name, (port, _) in listeners.items()
            ),
            "listener.security.protocol.map": ",".join(
                f"{name}:{listener.security_protocol}" for name, (_, listener) in listeners.items()
            ),
            "inter.broker.listener.name": "INTERNAL",
            "controller.listener.names": "CONTROLLER",
            "log.dirs": str(node.folder / "data"),
            "offsets.topic.replication.factor": copies,
            "transaction.state.log.replication.factor": copies,
            **_SETTINGS,
        }
        node.folder.mkdir(parents=True, exist_ok=True)
        for name, (_, listener) in listeners.items():
            entries |= _tls_properties(name.lower(), listener, node.folder)
            entries |= _sasl_properties(name.lower(), listener, self._users)
        lines = (f"{name}={value}\n" for name, value in (entries | dict(settings)).items())
        node.settings_file.write_text("".join(lines), "utf-8")

    def _format(self, nodes: Sequence[_Node]) -> None:
        mechanisms = {name for listener in self._listeners.values() for name in listener.mechanisms}
        scram_users = [
            f"--add-scram={mechanism}=[name={name},password={password}]"
            for mechanism in sorted(mechanisms - {"PLAIN"})
            for name, password in self._users.items()
        ]
        command = ("kafka.tools.StorageTool", "format", "-t", _CLUSTER_ID, *scram_users, "-c")
        logs = [node.folder / "format.log" for node in nodes]
        running = [
            ManagedProcess(node.java(*command), log) for node, log in zip(nodes, logs, strict=True)
        ]
        for process, log in zip(running, logs, strict=True):
            if process.wait() != 0:
                raise ProcessFailed(f"storage not formatted; see {log}")


def _authorizer_properties(super_users: Sequence[str]) -> dict[str, str]:
    """Lines of ``server.properties`` for access rules."""
    if not super_users:
        return {}
    return {
        "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
        "super.users": ";".join(f"User:{name}" for name in ("ANONYMOUS", *super_users)),
    }


def _tls_properties(name: str, listener: KafkaListener, folder: Path) -> dict[str, str]:
    """Lines of ``server.properties`` for a listener's certificate."""
    if listener.tls is None:
        return {}
    store = folder / f"{name}.pem"
    store.touch(mode=0o600)
    store.write_bytes(listener.tls.key.read_bytes() + listener.tls.certificate.read_bytes())
    lines = {"keystore.type": "PEM", "keystore.location": str(store)}
    if listener.client_ca_file is not None:
        lines |= {"truststore.type": "PEM", "truststore.location": str(listener.client_ca_file)}
        lines["client.auth"] = "required"
    return {f"listener.name.{name}.ssl.{key}": value for key, value in lines.items()}


def _sasl_properties(
    name: str, listener: KafkaListener, users: Mapping[str, str]
) -> dict[str, str]:
    """Lines of ``server.properties`` for a listener's SASL mechanisms."""
    if not listener.mechanisms:
        return {}
    names = " ".join(f'user_{user}="{password}"' for user, password in users.items())
    package, prefix = "org.apache.kafka.common.security", f"listener.name.{name}"
    modules = {
        mechanism: f"{package}.plain.PlainLoginModule required {names};"
        if mechanism == "PLAIN"
        else f"{package}.scram.ScramLoginModule required;"
        for mechanism in listener.mechanisms
    }
    return {
        f"{prefix}.sasl.enabled.mechanisms": ",".join(modules),
        **{f"{prefix}.{name.lower()}.sasl.jaas.config": line for name, line in modules.items()},
    }


def _broker_count(port: int) -> int:
    """Number of brokers that the one at ``port`` knows; 0 while it does not answer."""
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)):
            return 0
    client = Producer({"bootstrap.servers": f"127.0.0.1:{port}", "log_level": 0})
    try:
        return len(client.list_topics(timeout=10).brokers)
    except KafkaException:
        return 0
