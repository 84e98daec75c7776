"""Repetition of a request until the venue answers it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from random import Random
from typing import TypeVar

import structlog

from kronos_stream.backoff import Backoff
from kronos_stream.interfaces.source import SourceError, VenueRefused

_log = structlog.get_logger()

_MIN_SECONDS, _MAX_SECONDS = 1.0, 60.0

_T = TypeVar("_T")


async def load_with_retries(
    load: Callable[[], Awaitable[_T]],
    random: Random,
    sleep: Callable[[float], Awaitable[None]],
    venue: str,
) -> _T:
    """Load what a venue lists, however long that takes. Raises VenueRefused."""
    backoff = Backoff(random, initial=_MIN_SECONDS, maximum=_MAX_SECONDS)
    while True:
        try:
            return await load()
        except VenueRefused:
            raise
        except SourceError as error:
            _log.warning("cannot load symbols", venue=venue, why=str(error))
            await sleep(max(error.retry_after, backoff.next_delay()))
