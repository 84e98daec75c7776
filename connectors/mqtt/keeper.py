"""Keeps a connection: opens one, and another when it is lost."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from random import Random

import structlog

from kronos_connectors.mqtt.backoff import Backoff
from kronos_connectors.mqtt.link import Link, LinkError
from kronos_connectors.mqtt.reasons import SILENCE

_log = structlog.get_logger()

_SUSPICIOUS = 3
_TWINS = "does another client have the same KRONOS_STREAM_MQTT__CLIENT_ID?"
"""Some brokers hang up on the elder of two without a word, and both come back for ever."""


class Keeper:
    """One link at a time, for as long as it runs."""

    def __init__(self, make: Callable[[], Link], address: str, random: Random) -> None:
        """make: a new link. address: of the broker, for people."""
        self.trouble = "not connected yet"
        """Why there is no connection that works; empty while there is."""
        self.refused = False
        """Whether that is so until somebody changes something."""
        self.failed = asyncio.Event()
        """Set while tries fail."""
        self._make, self._address, self._random = make, address, random

    async def run(
        self, serve: Callable[[Link], Awaitable[None]], note: Callable[[str], None]
    ) -> None:
        """Until cancelled.

        serve: makes use of a link, says :meth:`works` once it can, and raises LinkError when it is
        lost. note: told "connected", "not connected" and "lost".
        """
        backoff, time = Backoff(self._random), asyncio.get_running_loop().time
        while True:
            link = self._make()
            opened: float | None = None
            try:
                await link.open()
                opened = time()
                note("connected")
                await serve(link)
            except LinkError as error:
                backoff.ended(None if opened is None else time() - opened)
                note("not connected" if opened is None else "lost")
                twins = error.answer is SILENCE and backoff.cut_short >= _SUSPICIOUS
                self.refused = error.refused
                self._fails(f"{error}; {_TWINS}" if twins else str(error))
            finally:
                await link.close()
            await asyncio.sleep(backoff.pause())

    def works(self) -> None:
        """The connection can be used."""
        self.trouble, self.refused = "", False
        self.failed.clear()
        _log.info("connected to mqtt broker", url=self._address)

    def _fails(self, why: str) -> None:
        if why != self.trouble:
            _log.warning("no mqtt broker, trying again", url=self._address, why=why)
        self.trouble = why
        self.failed.set()
