"""Keeps a connection: opens one, and another when it is lost."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from random import Random

import structlog

from kronos_connectors._shared.backoff import Backoff
from kronos_connectors.mqtt.connection import Connection, MqttConnectionError
from kronos_connectors.mqtt.reason_codes import NO_RESPONSE

_log = structlog.get_logger()

_SHORT_LIVED_LIMIT = 3
_DUPLICATE_CLIENT_ID_HINT = "does another client have the same KRONOS_STREAM_MQTT__CLIENT_ID?"
"""Some brokers hang up on the elder of two without a word, and both come back for ever."""


class Reconnector:
    """One link at a time, for as long as it runs."""

    def __init__(
        self, create_connection: Callable[[], Connection], address: str, random: Random
    ) -> None:
        """make: a new link. address: of the broker, for people."""
        self.problem = "not connected yet"
        """Why there is no connection that works; empty while there is."""
        self.permanent = False
        """Whether that is so until somebody changes something."""
        self.failing = asyncio.Event()
        """Set while tries fail."""
        self._create_connection, self._address, self._random = create_connection, address, random

    async def run(
        self, serve: Callable[[Connection], Awaitable[None]], on_event: Callable[[str], None]
    ) -> None:
        """Until cancelled.

        serve: makes use of a link, says :meth:`works` once it can, and raises LinkError when it is
        lost. note: told "connected", "not connected" and "lost".
        """
        backoff, time = Backoff(self._random), asyncio.get_running_loop().time
        while True:
            link = self._create_connection()
            opened: float | None = None
            try:
                await link.open()
                opened = time()
                on_event("connected")
                await serve(link)
            except MqttConnectionError as error:
                backoff.connection_ended(None if opened is None else time() - opened)
                on_event("not connected" if opened is None else "lost")
                twins = error.response is NO_RESPONSE and backoff.short_lived >= _SHORT_LIVED_LIMIT
                self.permanent = error.permanent
                self._record_failure(
                    f"{error}; {_DUPLICATE_CLIENT_ID_HINT}" if twins else str(error)
                )
            finally:
                await link.close()
            await asyncio.sleep(backoff.next_delay())

    def mark_ready(self) -> None:
        """The connection can be used."""
        self.problem, self.permanent = "", False
        self.failing.clear()
        _log.info("connected to mqtt broker", url=self._address)

    def _record_failure(self, problem: str) -> None:
        if problem != self.problem:
            _log.warning("no mqtt broker, trying again", url=self._address, why=problem)
        self.problem = problem
        self.failing.set()
