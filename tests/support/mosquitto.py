"""Mosquitto, an MQTT broker, as a process that tests stop, kill and start again.

Needs its programs: the broker and mosquitto_passwd (Debian and Ubuntu: package ``mosquitto``),
mosquitto_sub and mosquitto_pub (``mosquitto-clients``). It starts in some hundredths of a second.
All calls block; from a coroutine use a thread.
"""

from __future__ import annotations

import getpass
import json
import socket
import subprocess
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from tests.support.certificates import CertificateFiles
from tests.support.managed_process import Closeable, ServerProcess
from tests.support.ports import free_port
from tests.support.processes import find_program, wait_for

_SBIN = "/usr/sbin:/usr/local/sbin:/opt/homebrew/sbin"
"""Folders of the broker that may be missing on a user's PATH."""

_subscriber_numbers = count(1)


class Mosquitto(ServerProcess):
    """A broker in ``folder``.

    users: passwords by name; clients must then log in.
    tls: its certificate; clients must then use TLS.
    client_ca_file: PEM file of the authority that signs client certificates, which are then
        required.
    persistent: saves retained messages and sessions at every change, so that they survive
        :meth:`kill`, except for changes of the last moment.
    settings: further lines of ``mosquitto.conf``.
    """

    def __init__(
        self,
        folder: Path,
        *,
        users: Mapping[str, str] | None = None,
        tls: CertificateFiles | None = None,
        client_ca_file: Path | None = None,
        persistent: bool = True,
        settings: Sequence[str] = (),
    ) -> None:
        super().__init__(folder / "mosquitto.log")
        self._program = mosquitto_program("mosquitto")
        self._folder = folder
        self.port = free_port()
        """Restarts keep it."""
        self.url = f"{'mqtts' if tls else 'mqtt'}://127.0.0.1:{self.port}"
        (folder / "data").mkdir(parents=True, exist_ok=True)
        lines = [
            f"listener {self.port} 127.0.0.1",
            f"allow_anonymous {'false' if users else 'true'}",
            # Started by root, it would switch to a user who cannot write here.
            f"user {getpass.getuser()}",
            "log_type all",
            "set_tcp_nodelay true",  # else some of its answers take 40 ms
            f"persistence {'true' if persistent else 'false'}",
            f"persistence_location {folder / 'data'}/",
            "autosave_on_changes true",
            "autosave_interval 1",
        ]
        if users:
            lines.append(f"password_file {self._passwords(users)}")
        if tls:
            lines += [f"certfile {tls.certificate}", f"keyfile {tls.key}"]
            if client_ca_file:
                lines += [f"cafile {client_ca_file}", "require_certificate true"]
        lines += settings
        (folder / "mosquitto.conf").write_text("\n".join(lines) + "\n", "utf-8")

    def _command(self) -> Sequence[str | Path]:
        return [self._program, "-c", self._folder / "mosquitto.conf"]

    def _is_ready(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def _passwords(self, users: Mapping[str, str]) -> Path:
        path = self._folder / "passwords"
        path.write_text("".join(f"{name}:{word}\n" for name, word in users.items()), "utf-8")
        path.chmod(0o600)
        hashing = [mosquitto_program("mosquitto_passwd"), "-U", str(path)]
        subprocess.run(hashing, check=True, capture_output=True)
        return path


class ReceivedMessage(NamedTuple):
    """A message as a subscriber received it."""

    topic: str
    payload: bytes
    qos: int
    retained: bool
    """True for a retained message, sent because of the subscription."""
    properties: dict[str, Any]
    """Properties of MQTT 5, in the notation of mosquitto_sub."""


class Subscriber(Closeable):
    """mosquitto_sub with a persistent session, which reconnects after each outage.

    Needs a broker without logins. Runs from construction, which returns once it has subscribed, to
    :meth:`close`.
    """

    def __init__(self, broker: Mosquitto, folder: Path, topic: str = "#") -> None:
        name = f"subscriber-{next(_subscriber_numbers)}"
        self._file = folder / f"{name}.jsonl"
        command = _subscribe_command(broker, topic, "-c", "-i", name, "-x", "86400")
        with self._file.open("wb") as file:
            self._process = subprocess.Popen(command, stdout=file)
        wait_for(
            f"mosquitto_sub has subscribed; see {broker.log_file}",
            lambda: f"Sending SUBACK to {name}" in broker.log_file.read_text("utf-8", "replace"),
        )

    def messages(self) -> list[ReceivedMessage]:
        """All messages so far, in order."""
        return _parse_messages(self._file.read_bytes())

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def publish(broker: Mosquitto, topic: str, *payloads: bytes, retain: bool = False) -> None:
    """Publish to a broker without a login, QoS 1; no payload may have a line break.

    Returns once the broker has acknowledged them. Raises subprocess.CalledProcessError.
    """
    command = [mosquitto_program("mosquitto_pub"), *_connect_options(broker, topic), "-l"]
    subprocess.run(
        [*command, *(["-r"] if retain else [])],
        input=b"".join(payload + b"\n" for payload in payloads),
        check=True,
        capture_output=True,
    )


def retained_messages(broker: Mosquitto, topic: str = "#") -> dict[str, bytes]:
    """Messages that a broker without a login retains: topic → payload. Takes a second."""
    command = _subscribe_command(broker, topic, "--retained-only", "-W", "1")
    result = subprocess.run(command, capture_output=True, check=False)
    return {message.topic: message.payload for message in _parse_messages(result.stdout)}


def mosquitto_program(name: str) -> str:
    """Path of mosquitto, mosquitto_passwd, mosquitto_sub or mosquitto_pub. Raises ProcessFailed."""
    return find_program(name, "mosquitto", more_folders=_SBIN)


def _connect_options(broker: Mosquitto, topic: str) -> Sequence[str]:
    return ("-h", "127.0.0.1", "-p", str(broker.port), "-V", "5", "-q", "1", "-t", topic)


def _subscribe_command(broker: Mosquitto, topic: str, *options: str) -> list[str]:
    command = [mosquitto_program("mosquitto_sub"), *_connect_options(broker, topic)]
    return [*command, *options, "-F", "%j"]


def _parse_messages(lines: bytes) -> list[ReceivedMessage]:
    complete = lines[: lines.rfind(b"\n") + 1]
    return [
        ReceivedMessage(
            message["topic"],
            (message["payload"] or "").encode(),
            message["qos"],
            bool(message["retain"]),
            message.get("properties", {}),
        )
        for message in map(json.loads, complete.splitlines())
    ]
