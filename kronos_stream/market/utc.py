"""Conversion between UTC milliseconds and RFC 3339."""

from __future__ import annotations

from datetime import UTC, datetime


def rfc3339(time_ms: int) -> str:
    """Format UTC ms as ``2024-06-18T11:15:00Z``, with milliseconds if there are any."""
    moment = datetime.fromtimestamp(time_ms // 1000, UTC).replace(tzinfo=None)
    fraction = time_ms % 1000
    return moment.isoformat() + (f".{fraction:03d}Z" if fraction else "Z")


def parse_time(text: str) -> int:
    """Parse an ISO 8601 time (no zone means UTC) to UTC ms. Raises ValueError."""
    try:
        moment = datetime.fromisoformat(text.strip())
        if moment.tzinfo is not None:
            moment = moment.astimezone(UTC)
    except (OverflowError, ValueError):
        raise ValueError(
            f"time {text!r}: expected ISO 8601, such as 2024-06-18T11:15:00Z (no zone means UTC)"
        ) from None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return round(moment.timestamp() * 1000)
