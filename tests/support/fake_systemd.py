"""Receiver of sd_notify messages, in place of systemd."""

from __future__ import annotations

import socket
import time
from threading import Event, Thread
from typing import NamedTuple, Self

from tests.support.processes import wait_for


class Notification(NamedTuple):
    """A received message."""

    time: float
    """Monotonic seconds."""
    assignments: dict[str, str]


class FakeSystemd:
    """Notification socket; bound until the ``with`` block ends."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.notifications: list[Notification] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(f"\0{address[1:]}" if address.startswith("@") else address)
        self._socket.settimeout(0.1)
        self._stop = Event()
        self._receiver = Thread(target=self._receive, daemon=True)

    def matching(self, name: str, prefix: str = "", part: str = "") -> list[Notification]:
        """Return messages that assign ``name`` a value with this prefix that contains ``part``."""
        return [
            message
            for message in list(self.notifications)
            if name in message.assignments
            and message.assignments[name].startswith(prefix)
            and part in message.assignments[name]
        ]

    def wait_for(self, name: str, prefix: str, *, part: str = "", after: int = 0) -> Notification:
        """Wait for a matching message beyond the first ``after`` ones, and return it."""
        what = f"{name}={prefix}…{part}"
        wait_for(what, lambda: len(self.matching(name, prefix, part)) > after)
        return self.matching(name, prefix, part)[after]

    def wait_for_pings(self, count: int) -> None:
        """Wait for ``count`` more watchdog pings."""
        before = len(self.matching("WATCHDOG", "1"))
        wait_for("watchdog pings", lambda: len(self.matching("WATCHDOG", "1")) >= before + count)

    def seconds_since_ping(self) -> float:
        return time.monotonic() - self.matching("WATCHDOG", "1")[-1].time

    def _receive(self) -> None:
        while not self._stop.is_set():
            try:
                message = self._socket.recv(65_536).decode()
            except TimeoutError:
                continue
            assignments = dict(line.split("=", 1) for line in message.splitlines())
            self.notifications.append(Notification(time.monotonic(), assignments))

    def __enter__(self) -> Self:
        self._receiver.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._receiver.join()
        self._socket.close()
