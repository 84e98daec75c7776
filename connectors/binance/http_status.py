"""What Binance means by an HTTP status, in REST and in a websocket's handshake alike."""

from __future__ import annotations

BLOCKED_STATUSES = frozenset((403, 451))
"""It will not serve us: blocked, or not for where we are."""

RATE_LIMIT_STATUSES = frozenset((418, 429))
"""Too many requests; 418 after having ignored that."""

_DEFAULT_RETRY_SECONDS = 60.0
_MAX_RETRY_SECONDS = 3 * 86_400.0
"""The longest ban that the venue documents."""


def parse_retry_after(text: str | None) -> float:
    """Seconds that a ``Retry-After`` header asks for; a minute where it does not say."""
    if text is None or not (text.isascii() and text.isdecimal() and len(text) < 10):
        return _DEFAULT_RETRY_SECONDS
    return min(max(float(text), 1.0), _MAX_RETRY_SECONDS)
