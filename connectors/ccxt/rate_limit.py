"""Pauses that an exchange asks for, kept by all who ask it."""

from __future__ import annotations

from collections.abc import Callable

import structlog

from kronos_stream.interfaces.source import SourceError

_log = structlog.get_logger()


class Cooldown:
    """When an exchange wants to be left alone by all who ask it. Times are the event loop's."""

    def __init__(self, name: str) -> None:
        self.on_event: Callable[[str], None] = lambda _: None
        """Told of what is worth counting."""
        self._name, self._until = name, 0.0

    def check(self, now: float) -> None:
        """Raises SourceError while nobody may ask."""
        wait = self._until - now
        if wait > 0:
            raise SourceError(f"{self._name}: asked to wait for another {wait:.0f} s", wait)

    def record(self, error: SourceError, now: float) -> None:
        """Keep the pause that an answer asks for."""
        if error.retry_after:
            self._until = max(self._until, now + error.retry_after)
            self.on_event("rate limited")
            _log.warning("asked to wait", why=str(error), seconds=error.retry_after)
