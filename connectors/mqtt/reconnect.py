"""Reconnection: opens a connection, and another one when it is lost."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from random import Random

import structlog

from kronos_connectors.mqtt.connection import Connection, MqttConnectionError
from kronos_connectors.mqtt.reason_codes import NO_RESPONSE
from kronos_stream.backoff import Backoff

_log = structlog.get_logger()

_MIN_RETRY_SECONDS, _MAX_RETRY_SECONDS = 0.25, 10.0
_SHORT_LIVED_LIMIT = 3
_DUPLICATE_CLIENT_ID_HINT = "does another client have the same KRONOS_STREAM_MQTT__CLIENT_ID?"
"""Some brokers disconnect the older of two such clients without a reason, and both reconnect."""


class Reconnector:
    """One connection at a time, while :meth:`run` runs."""

    def __init__(
        self, create_connection: Callable[[], Connection], address: str, random: Random
    ) -> None:
        """address: of the broker, for messages."""
        self.problem = "not connected yet"
        """Why no connection can be used; empty while one can."""
        self.permanent = False
        """True if retries fail until the configuration changes."""
        self.failing = asyncio.Event()
        """Set while attempts fail."""
        self._create_connection, self._address = create_connection, address
        self._backoff = Backoff(random, initial=_MIN_RETRY_SECONDS, maximum=_MAX_RETRY_SECONDS)
        self._short_lived = 0
        """Number of consecutive connections that were made and soon lost."""

    async def run(
        self, serve: Callable[[Connection], Awaitable[None]], on_event: Callable[[str], None]
    ) -> None:
        """Run until cancelled.

        serve: uses a connection, calls :meth:`mark_ready` once it can be used, and raises
        MqttConnectionError when it is lost. on_event: called with "connected", "not connected" and
        "lost".
        """
        time = asyncio.get_running_loop().time
        while True:
            connection = self._create_connection()
            opened: float | None = None
            try:
                await connection.open()
                opened = time()
                on_event("connected")
                await serve(connection)
            except MqttConnectionError as error:
                self._on_ended(None if opened is None else time() - opened)
                on_event("not connected" if opened is None else "lost")
                self._record_failure(error)
            finally:
                await connection.close()
            await asyncio.sleep(self._backoff.next_delay())

    def mark_ready(self) -> None:
        """Record that the connection can be used."""
        self.problem, self.permanent = "", False
        self.failing.clear()
        _log.info("connected to mqtt broker", url=self._address)

    def _on_ended(self, uptime: float | None) -> None:
        """Reset the retry delay after a connection that held.

        uptime: seconds; None if it could not be made. A short connection is no better than none.
        """
        self._short_lived = 0 if uptime is None else self._short_lived + 1
        if uptime is not None and uptime > _MAX_RETRY_SECONDS:
            self._short_lived = 0
            self._backoff.reset()

    def _record_failure(self, error: MqttConnectionError) -> None:
        """Log each outage once."""
        problem = str(error)
        if error.response is NO_RESPONSE and self._short_lived >= _SHORT_LIVED_LIMIT:
            problem = f"{problem}; {_DUPLICATE_CLIENT_ID_HINT}"
        if problem != self.problem:
            _log.warning("no mqtt broker, trying again", url=self._address, why=problem)
        self.problem, self.permanent = problem, error.permanent
        self.failing.set()
