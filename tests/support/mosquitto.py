"""Mosquitto, a real MQTT broker, as a process: to be stopped, killed and started again at will.

Needs its programs: the broker and mosquitto_passwd (Debian and Ubuntu: package ``mosquitto``),
mosquitto_sub and mosquitto_pub (``mosquitto-clients``). It is up in some hundredths of a second.
All calls block; from a coroutine use a thread.
"""

from __future__ import annotations

import getpass
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple, Self

from tests.support.certificates import CertificateFiles
from tests.support.managed_process import Closeable, ManagedProcess

_PORTS = count(os.getpid() * 41)
_START_TIMEOUT = 20.0
_STOP_TIMEOUT = 10.0
_SEARCH_PATH = "/usr/sbin:/usr/local/sbin:/opt/homebrew/sbin"
"""Where it may be installed without being on a user's PATH."""


class MosquittoFailed(Exception):  # noqa: N818
    """It is not installed, or did not come up; says where its log is."""


class Mosquitto(Closeable):
    """A broker in ``folder``, running from :meth:`start` to :meth:`close`, or in a ``with`` block.

    users: passwords by name; clients must then log in.
    tls: its certificate; clients must then encrypt.
    clients: who vouches for clients, PEM, which must then show a certificate of their own.
    persistent: whether it saves its memory at every change, so that what it retains and the
        sessions it holds survive :meth:`kill`, all but what came in the last moment.
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
        self._program = find_program()
        self._folder = folder
        self._process: ManagedProcess | None = None
        self.port = _free_port()
        """It stays the same through restarts."""
        self.url = f"{'mqtts' if tls else 'mqtt'}://127.0.0.1:{self.port}"
        self.log_file = folder / "mosquitto.log"
        (folder / "data").mkdir(parents=True, exist_ok=True)
        lines = [
            f"listener {self.port} 127.0.0.1",
            f"allow_anonymous {'false' if users else 'true'}",
            # It would leave root's rights for those of a user who cannot write here.
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

    def start(self) -> None:
        """Start it, and wait until it takes connections. Raises MosquittoFailed."""
        command = [self._program, "-c", str(self._folder / "mosquitto.conf")]
        self._process = ManagedProcess(command, self.log_file)
        deadline = time.monotonic() + _START_TIMEOUT
        while not _is_listening(self.port):
            if not self._process.alive or time.monotonic() > deadline:
                self.close()
                raise MosquittoFailed(f"mosquitto did not come up; see {self.log_file}")
            time.sleep(0.02)

    def stop(self) -> None:
        """End it in good order: it saves what it knows."""
        self._signal(signal.SIGTERM)
        self._stop_process(_STOP_TIMEOUT)

    def kill(self) -> None:
        """End it with SIGKILL: no farewell to anyone, and nothing more is saved."""
        self._stop_process(0)

    def freeze(self) -> None:
        """Let it hang: connected, and silent."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        self._signal(signal.SIGCONT)

    def close(self) -> None:
        """End it by force; its folder remains."""
        self.kill()

    def __enter__(self) -> Self:
        self.start()
        return self

    def _passwords(self, users: Mapping[str, str]) -> Path:
        path = self._folder / "passwords"
        path.write_text("".join(f"{name}:{word}\n" for name, word in users.items()), "utf-8")
        path.chmod(0o600)
        hashing = [_which("mosquitto_passwd"), "-U", str(path)]
        subprocess.run(hashing, check=True, capture_output=True)
        return path

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.signal(number)

    def _stop_process(self, timeout: float) -> None:
        if self._process is not None:
            self._process.wait_or_kill(timeout)
        self._process = None


class ReceivedMessage(NamedTuple):
    """A message, as a subscriber got it."""

    topic: str
    payload: bytes
    qos: int
    retained: bool
    """Whether it was there before the subscription."""
    properties: dict[str, Any]
    """Of MQTT 5, as mosquitto_sub writes them."""


class Subscriber(Closeable):
    """mosquitto_sub on a broker without a login: keeps its session, comes back after each outage.

    From construction, which returns once it has subscribed, to :meth:`close`.
    """

    def __init__(self, broker: Mosquitto, folder: Path, topic: str = "#") -> None:
        name = f"subscriber-{next(_PORTS)}"
        self._file = folder / f"{name}.jsonl"
        command = _subscribe_command(broker, topic, "-c", "-i", name, "-x", "86400")
        with self._file.open("wb") as file:
            self._process = subprocess.Popen(command, stdout=file)
        deadline = time.monotonic() + _START_TIMEOUT
        while f"Sending SUBACK to {name}" not in broker.log_file.read_text("utf-8", "replace"):
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.close()
                raise MosquittoFailed(f"mosquitto_sub did not subscribe; see {broker.log_file}")
            time.sleep(0.02)

    def messages(self) -> list[ReceivedMessage]:
        """All that has come so far, in order."""
        return _parse_messages(self._file.read_bytes())

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()


def publish(broker: Mosquitto, topic: str, *payloads: bytes, retain: bool = False) -> None:
    """Publish to a broker without a login, QoS 1; no payload may have a line break.

    Returns once the broker has acknowledged them. Raises subprocess.CalledProcessError.
    """
    where = ("-h", "127.0.0.1", "-p", str(broker.port), "-V", "5", "-q", "1", "-t", topic)
    lines = b"".join(payload + b"\n" for payload in payloads)
    subprocess.run(
        [_which("mosquitto_pub"), *where, "-l", *(["-r"] if retain else [])],
        input=lines,
        check=True,
        capture_output=True,
    )


def retained_messages(broker: Mosquitto, topic: str = "#") -> dict[str, bytes]:
    """What a broker without a login retains: topic → payload. Takes a second."""
    command = _subscribe_command(broker, topic, "--retained-only", "-W", "1")
    said = subprocess.run(command, capture_output=True, check=False)
    return {message.topic: message.payload for message in _parse_messages(said.stdout)}


def find_program() -> str:
    """Where the broker is installed. Raises MosquittoFailed."""
    return _which("mosquitto")


def _which(name: str) -> str:
    path = os.pathsep.join((os.environ.get("PATH", os.defpath), _SEARCH_PATH))
    if (found := shutil.which(name, path=path)) is None:
        raise MosquittoFailed(f"no {name} on PATH; Debian and Ubuntu have it in package mosquitto")
    return found


def _subscribe_command(broker: Mosquitto, topic: str, *options: str) -> list[str]:
    where = ("-h", "127.0.0.1", "-p", str(broker.port), "-V", "5", "-q", "1", "-t", topic)
    return [_which("mosquitto_sub"), *where, *options, "-F", "%j"]


def _parse_messages(lines: bytes) -> list[ReceivedMessage]:
    whole = lines[: lines.rfind(b"\n") + 1]
    return [
        ReceivedMessage(
            one["topic"],
            (one["payload"] or "").encode(),
            one["qos"],
            bool(one["retain"]),
            one.get("properties", {}),
        )
        for one in map(json.loads, whole.splitlines())
    ]


def _is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _free_port() -> int:
    """A port free now, and not the kernel's to give to others while the broker is down."""
    for _ in range(10_000):
        port = 20_000 + next(_PORTS) % 10_000
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
    raise MosquittoFailed("no free port from 20000 to 30000")
