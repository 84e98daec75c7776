"""Client of systemd's notification protocol, see sd_notify(3) and systemd.service(5).

It never blocks: a message that the service manager does not accept at once is sent again before the
next one, so messages stay in order.
"""

from __future__ import annotations

import os
import socket
from collections import deque
from collections.abc import MutableMapping
from typing import Self

import structlog

_log = structlog.get_logger()

_MAX_PENDING = 50
"""Messages kept while the service manager does not read."""
_VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")


class Notifier:
    """Sends notifications to the service manager; does nothing if there is none."""

    def __init__(self, address: str = "", watchdog_seconds: float = 0.0) -> None:
        """address: a path, or an abstract name after ``@``; empty if there is no manager.

        watchdog_seconds: interval within which the manager expects a ping; 0 if it expects none.
        """
        self.watchdog_seconds = watchdog_seconds if address else 0.0
        self._address = f"\0{address[1:]}" if address.startswith("@") else address
        self._pending: deque[bytes] = deque(maxlen=_MAX_PENDING)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) if address else None
        if self._socket is not None:
            self._socket.settimeout(0.0)

    @classmethod
    def from_environ(cls, environ: MutableMapping[str, str]) -> Self:
        """Create the notifier for the variables set by systemd.

        The variables are removed, so that child processes do not use them.
        """
        address, interval, pid = (environ.pop(name, "") for name in _VARIABLES)
        if address and not address.startswith(("/", "@")):
            _log.warning("service manager not notified: unsupported socket", socket=address)
            address = ""
        ours = not pid or pid == str(os.getpid())
        return cls(address, int(interval) / 1e6 if ours and interval.isdecimal() else 0.0)

    @property
    def enabled(self) -> bool:
        """True if there is a service manager to notify."""
        return self._socket is not None

    def notify(self, **assignments: object) -> None:
        """Send assignments in one message, such as ``READY=1, STATUS="following 20 series"``."""
        if self._socket is None:
            return
        lines = (f"{name}={' '.join(str(value).split())}" for name, value in assignments.items())
        self._pending.append("\n".join(lines).encode("utf-8", "replace"))
        self._send(self._socket)

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _send(self, to: socket.socket) -> None:
        while self._pending:
            try:
                to.sendto(self._pending[0], self._address)
            except BlockingIOError:  # the manager's queue is full
                return
            except OSError as error:
                why = error.strerror or str(error)
                _log.warning("service manager not notified", why=why)
            self._pending.popleft()
