"""HTTP statuses by which exchanges refuse requests, and the pauses that they ask for."""

from __future__ import annotations

from kronos_stream.interfaces.source import SourceError

BLOCKED_STATUSES = frozenset((403, 451))
"""Blocked, or not available in this region."""

RATE_LIMIT_STATUSES = frozenset((418, 429))
"""Too many requests; 418 after 429 was ignored."""

DEFAULT_RETRY_SECONDS = 60.0
"""Pause after too many requests if the exchange specifies none."""

_MAX_RETRY_SECONDS = 3 * 86_400.0
"""The longest ban that Binance documents."""


def parse_retry_after(text: str | None) -> float:
    """Seconds that a ``Retry-After`` header asks for, within bounds."""
    if text is None or not (text.isascii() and text.isdecimal() and len(text) < 10):
        return DEFAULT_RETRY_SECONDS
    return min(max(float(text), 1.0), _MAX_RETRY_SECONDS)


def check_pause(seconds: float, prefix: str = "") -> None:
    """Raise SourceError if a pause still has ``seconds`` to go."""
    if seconds > 0:
        raise SourceError(f"{prefix}asked to wait for another {seconds:.0f} s", seconds)
