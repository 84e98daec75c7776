"""Reconnection after short and long connections, in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from itertools import pairwise
from random import Random
from typing import Any, cast

import pytest

from kronos_connectors.mqtt.connection import Connection, MqttConnectionError
from kronos_connectors.mqtt.reconnect import Reconnector

pytestmark = pytest.mark.virtual_time


class ScriptedConnection:
    """A connection that is lost after ``uptime`` seconds, or cannot be made without one."""

    def __init__(self, uptime: float | None) -> None:
        self._uptime = uptime
        self.opened = self.closed = 0.0

    async def open(self) -> None:
        self.opened = asyncio.get_running_loop().time()
        if self._uptime is None:
            raise MqttConnectionError("connection refused")

    async def wait_until_lost(self) -> None:
        await asyncio.sleep(self._uptime or 0.0)
        raise MqttConnectionError("connection lost")

    async def close(self) -> None:
        self.closed = asyncio.get_running_loop().time()


async def _reconnect(uptimes: Sequence[float | None]) -> tuple[list[float], str]:
    """Delays after connections with these uptimes, and the problem at the end."""
    connections = [ScriptedConnection(uptime) for uptime in uptimes]
    remaining, done = iter(connections), asyncio.Event()

    def create() -> Connection:
        if (connection := next(remaining, None)) is None:
            done.set()
            connection = ScriptedConnection(1e9)
            connections.append(connection)
        return cast("Connection", connection)

    async def serve(connection: Any) -> None:
        await connection.wait_until_lost()

    reconnector = Reconnector(create, "mqtt://broker:1883", Random(0))
    task = asyncio.create_task(reconnector.run(serve, lambda _: None))
    await done.wait()
    await asyncio.sleep(1)
    task.cancel()
    await asyncio.wait([task])
    pairs = pairwise(connections)
    return [later.opened - earlier.closed for earlier, later in pairs], reconnector.problem


async def test_delays_grow_to_their_limit_while_connections_fail() -> None:
    delays, problem = await _reconnect([None] * 40)
    assert 0.125 <= delays[0] <= 0.25
    assert all(5.0 <= delay <= 10.0 for delay in delays[7:])
    assert len({round(delay, 6) for delay in delays}) == len(delays)
    assert problem == "connection refused"


async def test_short_connections_do_not_reset_the_delay_and_get_a_hint() -> None:
    delays, problem = await _reconnect([1.0] * 12)
    assert all(delay >= 5.0 for delay in delays[7:])
    assert "KRONOS_STREAM_MQTT__CLIENT_ID" in problem


async def test_failed_attempt_ends_a_row_of_short_connections() -> None:
    _, problem = await _reconnect([1.0, 1.0, None, 1.0])
    assert problem == "connection lost"


async def test_long_connection_resets_the_delay() -> None:
    delays, problem = await _reconnect([*[1.0] * 9, 11.0])
    assert delays[-2] >= 5.0
    assert delays[-1] <= 0.25
    assert problem == "connection lost"
