"""What a service manager wants to hear, over the socket that it names: systemd's protocol.

See sd_notify(3) and systemd.service(5). Nothing is ever waited for: a message that the manager does
not take just now is sent again with the next one, in order.
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
"""Messages kept for a manager that does not listen."""
_VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")


class Notifier:
    """Speaks to the service manager; to nobody where there is none."""

    def __init__(self, address: str = "", watchdog_seconds: float = 0.0) -> None:
        """address: a path, or an abstract name behind ``@``; empty: nobody listens.

        watchdog: seconds within which the manager wants a sign of life; 0: none is wanted.
        """
        self.watchdog_seconds = watchdog_seconds if address else 0.0
        self._address = f"\0{address[1:]}" if address.startswith("@") else address
        self._pending: deque[bytes] = deque(maxlen=_MAX_PENDING)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) if address else None
        if self._socket is not None:
            self._socket.settimeout(0.0)

    @classmethod
    def from_environ(cls, environ: MutableMapping[str, str]) -> Self:
        """The one that the environment names. Taken out of it: our children are none of theirs."""
        address, wanted, pid = (environ.pop(name, "") for name in _VARIABLES)
        if address and not address.startswith(("/", "@")):
            _log.warning("service manager cannot be told: no such sockets here", socket=address)
            address = ""
        ours = not pid or pid == str(os.getpid())
        return cls(address, int(wanted) / 1e6 if ours and wanted.isdecimal() else 0.0)

    @property
    def enabled(self) -> bool:
        """Whether anybody does."""
        return self._socket is not None

    def notify(self, **assignments: object) -> None:
        """Send assignments as one message, such as ``READY=1, STATUS="following 20 series"``."""
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
            except BlockingIOError:  # it has more to read than it likes
                return
            except OSError as error:
                why = error.strerror or str(error)
                _log.warning("service manager cannot be told", why=why)
            self._pending.popleft()
