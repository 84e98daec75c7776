"""Apache Kafka itself, from a folder of its jars: one node or several, to be killed at will.

Needs Java 17. The jars are those of ``org.apache.kafka:kafka_2.13`` and what it depends on, or the
folder ``libs`` of a Kafka distribution. Each node is broker and controller (KRaft), takes about
350 MB and is up in two to four seconds. All calls block; from a coroutine use a thread.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from confluent_kafka import KafkaException, Producer

from tests.support.certificates import CertificateFiles
from tests.support.managed_process import Closeable, ManagedProcess

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
    # A killed node is noticed in seconds, so that tests of failover take no longer.
    "broker.heartbeat.interval.ms": "500",
    "broker.session.timeout.ms": "3000",
}
_START_TIMEOUT = 60.0
_STOP_TIMEOUT = 20.0


class KafkaFailed(Exception):  # noqa: N818
    """Java or the jars are missing, or a node did not come up; says where its log is."""


@dataclass(frozen=True, slots=True)
class KafkaListener:
    """One more way into a node, at a port of its own."""

    tls: CertificateFiles | None = None
    """Its certificate; clients must then encrypt."""
    client_ca_file: Path | None = None
    """Who vouches for clients, PEM, which must then show a certificate of their own."""
    mechanisms: Sequence[str] = ()
    """PLAIN, SCRAM-SHA-256, SCRAM-SHA-512: by which of them clients must log in, if by any."""

    @property
    def security_protocol(self) -> str:
        """As ``security.protocol`` calls it."""
        encrypted = "SSL" if self.tls else "PLAINTEXT"
        return f"SASL_{encrypted}" if self.mechanisms else encrypted


@dataclass(slots=True)
class _Node:
    folder: Path
    client: int
    internal: int
    controller: int
    others: Sequence[int]
    process: ManagedProcess | None = None


class ApacheKafka(Closeable):
    """A cluster in ``folder``, running from :meth:`start` to :meth:`close`, or in a ``with`` block.

    jars: folder of Kafka's jars.
    users: passwords by name; clients must then log in by SASL/PLAIN (without TLS).
    listeners: further ways in by name, for the same users; see :meth:`at`.
    settings: lines of ``server.properties`` in place of our own or Kafka's.
    """

    def __init__(
        self,
        jars: Path,
        folder: Path,
        nodes: int = 1,
        *,
        users: Mapping[str, str] | None = None,
        listeners: Mapping[str, KafkaListener] | None = None,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        if shutil.which("java") is None:
            raise KafkaFailed("no java on PATH: Kafka needs Java 17 or later")
        if not any(jars.glob("kafka_2.13-*.jar")):
            raise KafkaFailed(f"{jars}: no kafka_2.13 jar there")
        self._jars = jars
        self._users, self._listeners = dict(users or {}), dict(listeners or {})
        each = 3 + len(self._listeners)
        ports = _free_ports(each * nodes)
        self._nodes = []
        for n in range(nodes):
            client, internal, controller, *others = ports[n * each : (n + 1) * each]
            node = _Node(folder / f"node-{n}", client, internal, controller, others)
            self._nodes.append(node)
        self.bootstrap = ",".join(f"127.0.0.1:{node.client}" for node in self._nodes)
        """Addresses for ``bootstrap.servers``; they stay the same through restarts."""
        for n in range(nodes):
            self._configure(n, settings or {})

    def bootstrap_for(self, listener: str) -> str:
        """Addresses for ``bootstrap.servers`` of one of the further listeners."""
        place = [*self._listeners].index(listener)
        return ",".join(f"127.0.0.1:{node.others[place]}" for node in self._nodes)

    def start(self, *numbers: int) -> None:
        """Start the nodes, all without a number, and wait until they serve.

        Data of an earlier run in the folder are kept. Raises KafkaFailed.
        """
        chosen = [self._nodes[n] for n in numbers or range(len(self._nodes))]
        self._format([node for node in chosen if not (node.folder / "data").exists()])
        for node in chosen:
            command = self._java("kafka.Kafka", node.folder / "server.properties")
            node.process = ManagedProcess(command, node.folder / "server.log")
        self._wait_until_ready(chosen)

    def kill(self, *numbers: int) -> None:
        """End nodes, all without a number, with SIGKILL: no farewell to anyone."""
        for n in numbers or range(len(self._nodes)):
            self._stop_node(self._nodes[n], 0)

    def stop(self, *numbers: int) -> None:
        """End nodes, all without a number, in good order, or after 20 s by force."""
        self._signal(signal.SIGTERM, numbers)
        for n in numbers or range(len(self._nodes)):
            self._stop_node(self._nodes[n], _STOP_TIMEOUT)

    def freeze(self, *numbers: int) -> None:
        """Let nodes, all without a number, hang: connected, and silent."""
        self._signal(signal.SIGSTOP, numbers)

    def thaw(self, *numbers: int) -> None:
        """Let nodes, all without a number, go on."""
        self._signal(signal.SIGCONT, numbers)

    def close(self) -> None:
        """End all nodes by force; their folders remain."""
        self.kill()

    def node_at_port(self, port: int) -> int:
        """Which node clients reach at ``port``."""
        return [node.client for node in self._nodes].index(port)

    def __enter__(self) -> Self:
        with ExitStack() as undo:
            undo.callback(self.close)
            self.start()
            undo.pop_all()
        return self

    def _configure(self, n: int, settings: Mapping[str, str]) -> None:
        node, copies = self._nodes[n], str(min(3, len(self._nodes)))
        ways = {
            "CLIENT": (node.client, KafkaListener(mechanisms=["PLAIN"] if self._users else [])),
            "INTERNAL": (node.internal, KafkaListener()),
            "CONTROLLER": (node.controller, KafkaListener()),
        }
        for port, (name, listener) in zip(node.others, self._listeners.items(), strict=True):
            ways[name.upper()] = port, listener
        entries = {
            "process.roles": "broker,controller",
            "node.id": str(n + 1),
            "controller.quorum.voters": ",".join(
                f"{i}@127.0.0.1:{peer.controller}" for i, peer in enumerate(self._nodes, 1)
            ),
            "listeners": ",".join(f"{name}://127.0.0.1:{port}" for name, (port, _) in ways.items()),
            "listener.security.protocol.map": ",".join(
                f"{name}:{listener.security_protocol}" for name, (_, listener) in ways.items()
            ),
            "inter.broker.listener.name": "INTERNAL",
            "controller.listener.names": "CONTROLLER",
            "log.dirs": str(node.folder / "data"),
            "offsets.topic.replication.factor": copies,
            "transaction.state.log.replication.factor": copies,
            **_SETTINGS,
        }
        node.folder.mkdir(parents=True, exist_ok=True)
        for name, (_, listener) in ways.items():
            entries |= _tls_properties(name.lower(), listener, node.folder)
            entries |= _sasl_properties(name.lower(), listener, self._users)
        lines = (f"{name}={value}\n" for name, value in (entries | dict(settings)).items())
        (node.folder / "server.properties").write_text("".join(lines), "utf-8")

    def _format(self, nodes: list[_Node]) -> None:
        wanted = {way for listener in self._listeners.values() for way in listener.mechanisms}
        scrams = [
            f"--add-scram={way}=[name={name},password={password}]"
            for way in sorted(wanted - {"PLAIN"})
            for name, password in self._users.items()
        ]
        formatting = []
        for node in nodes:
            command = ("kafka.tools.StorageTool", "format", "-t", _CLUSTER_ID, *scrams, "-c")
            log = node.folder / "format.log"
            child = ManagedProcess(self._java(*command, node.folder / "server.properties"), log)
            formatting.append((child, log))
        for child, log in formatting:
            if child.wait(_START_TIMEOUT) != 0:
                raise KafkaFailed(f"storage not formatted; see {log}")

    def _java(self, *command: str | Path) -> Sequence[str | Path]:
        return ["java", *_JVM_OPTIONS, "-cp", f"{self._jars}/*", *command]

    def _wait_until_ready(self, nodes: list[_Node]) -> None:
        deadline = time.monotonic() + _START_TIMEOUT
        running = sum(node.process is not None for node in self._nodes)
        for node in nodes:
            while _broker_count(node.internal) < running:
                ended = node.process is None or not node.process.alive
                if ended or time.monotonic() > deadline:
                    raise KafkaFailed(f"a node did not come up; see {node.folder / 'server.log'}")
                time.sleep(0.1)

    def _signal(self, number: signal.Signals, nodes: Sequence[int]) -> None:
        for n in nodes or range(len(self._nodes)):
            process = self._nodes[n].process
            if process is not None:
                process.signal(number)

    def _stop_node(self, node: _Node, timeout: float) -> None:
        if node.process is not None:
            node.process.wait_or_kill(timeout)
        node.process = None


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
    """Lines of ``server.properties`` for a listener's logins."""
    if not listener.mechanisms:
        return {}
    names = " ".join(f'user_{user}="{password}"' for user, password in users.items())
    package, begins = "org.apache.kafka.common.security", f"listener.name.{name}"
    modules = {
        way: f"{package}.plain.PlainLoginModule required {names};"
        if way == "PLAIN"
        else f"{package}.scram.ScramLoginModule required;"
        for way in listener.mechanisms
    }
    return {
        f"{begins}.sasl.enabled.mechanisms": ",".join(modules),
        **{f"{begins}.{way.lower()}.sasl.jaas.config": line for way, line in modules.items()},
    }


def _broker_count(port: int) -> int:
    """How many brokers the one at ``port`` knows; 0 while it does not answer."""
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)):
            return 0
    client = Producer({"bootstrap.servers": f"127.0.0.1:{port}", "log_level": 0})
    try:
        return len(client.list_topics(timeout=1).brokers)
    except KafkaException:
        return 0


def _free_ports(count: int) -> list[int]:
    """Ports free now, and not the kernel's to give to others while a node is down."""
    ports: list[int] = []
    for step in range(10_000):
        port = 20_000 + (os.getpid() * 37 + step) % 10_000
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):  # nobody listens
                ports.append(port)
        if len(ports) == count:
            return ports
    raise KafkaFailed("no free ports from 20000 to 30000")
