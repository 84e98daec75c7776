"""Pauses that an exchange asks for."""

from __future__ import annotations

from collections.abc import Callable

import structlog

from kronos_connectors._shared.http_status import check_pause
from kronos_stream.interfaces.source import SourceError

_log = structlog.get_logger()


class Cooldown:
    """Pause of all requests to an exchange. Times are seconds of the event loop's clock."""

    def __init__(self, name: str) -> None:
        self.on_event: Callable[[str], None] = lambda _: None
        """Called with the events to count."""
        self._name, self._until = name, 0.0

    def check(self, now: float) -> None:
        """Raise SourceError during a pause."""
        check_pause(self._until - now, f"{self._name}: ")

    def record(self, error: SourceError, now: float) -> None:
        """Start the pause that an error asks for, if any."""
        if error.retry_after:
            self._until = max(self._until, now + error.retry_after)
            self.on_event("rate limited")
            _log.warning("asked to wait", why=str(error), seconds=error.retry_after)
