"""Checks of ``kronos-stream doctor``."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from websockets.asyncio.client import connect
from websockets.exceptions import InvalidHandshake, InvalidStatus, InvalidURI

from kronos_connectors._shared.http_status import BLOCKED_STATUSES
from kronos_connectors.binance.rest import RestClient
from kronos_stream.interfaces.diagnostics import Finding
from kronos_stream.interfaces.probes import compare_clocks
from kronos_stream.interfaces.source import SourceError, VenueRefused
from kronos_stream.market.clock import Clock
from kronos_stream.market.series import Series


async def check_clock(
    rest: RestClient, clock: Clock, series: Collection[Series]
) -> Sequence[Finding]:
    """Check REST, and our clock against the venue's. Raises SourceError."""
    return [await compare_clocks(rest.server_time, clock, series)]


async def check_websocket(url: str, timeout_seconds: float) -> Sequence[Finding]:
    """Check that a websocket opens. Raises SourceError."""
    try:
        async with connect(url, open_timeout=timeout_seconds, close_timeout=1.0, proxy=None):
            return [Finding("ok", f"{url} opens")]
    except InvalidStatus as error:
        status = error.response.status_code
        raise (VenueRefused if status in BLOCKED_STATUSES else SourceError)(
            f"{url}: HTTP {status}"
        ) from None
    except (OSError, InvalidHandshake, InvalidURI, EOFError) as error:
        raise SourceError(f"{url}: {error or type(error).__name__}") from None
