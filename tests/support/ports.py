"""Ports for servers that are stopped and started again."""

from __future__ import annotations

import os
import socket
from itertools import count

from tests.support.processes import ProcessFailed

_FIRST, _COUNT = 20_000, 10_000  # below the range from which the kernel takes ports for clients
_offsets = count(os.getpid() * 397)  # test runs at the same time take others


def free_port() -> int:
    """Return a port that is free now, and that the kernel gives to no client later."""
    return free_ports(1)[0]


def free_ports(number: int) -> list[int]:
    """Return so many different ports as :func:`free_port` does. Raises ProcessFailed."""
    ports: list[int] = []
    for _ in range(_COUNT):
        if len(ports) == number:
            return ports
        port = _FIRST + next(_offsets) % _COUNT
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        ports.append(port)
    raise ProcessFailed(f"no {number} free ports from {_FIRST} to {_FIRST + _COUNT}")
