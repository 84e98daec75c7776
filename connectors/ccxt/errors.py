"""Translation of ccxt's exceptions into errors of a source."""

from __future__ import annotations

import re
from collections.abc import Callable

from kronos_connectors._shared.http_status import (
    BLOCKED_STATUSES,
    DEFAULT_RETRY_SECONDS,
    RATE_LIMIT_STATUSES,
    parse_retry_after,
)
from kronos_stream.interfaces.source import SourceError, VenueRefused
from kronos_stream.redaction import redact_parameters, shorten

_FORBIDDEN_SECONDS = 600.0
"""Pause after HTTP 403: exchanges use it for blocked addresses and for too many requests."""

_MAX_ERROR_LENGTH = 200

_PLACE = r"(countr|region|location|jurisdiction|territor)"
_RESTRICTED = re.compile(
    rf"(restricted|prohibited|unsupported|ineligible) {_PLACE}"
    rf"|(not|un)\W?(available|supported|permitted|allowed) (in|from|for) (your|this) {_PLACE}",
    re.IGNORECASE,
)


class HttpStatusError(Exception):
    """HTTP status whose meaning ccxt does not pass on."""

    def __init__(self, status: int, body: str, retry_after: str | None = None) -> None:
        super().__init__(f"HTTP {status} {body}")
        self.status, self.body, self.retry_after = status, body, retry_after


class SeriesRefused(SourceError):  # noqa: N818 - as VenueRefused is
    """The exchange or ccxt refuses a request for this series; other series may work."""


def translate_error(
    error: Exception, venue: str, redact: Callable[[str], str] = lambda text: text
) -> SourceError:
    """Translate an exception of ccxt.

    redact: removes secrets from a text.

    Returns SeriesRefused if it may concern the series alone, VenueRefused if the exchange will
    never serve us; else an error to retry after :attr:`SourceError.retry_after`.
    """
    if isinstance(error, SourceError):
        return error
    message = f"{venue}: {_describe(error, redact)}"
    status = error if isinstance(error, HttpStatusError) else _handshake_status(error)
    if status is not None:
        return _status_error(status, message)
    # By name: importing ccxt takes seconds, and it has each class twice.
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if "AuthenticationError" in kinds:
        message += "; keys are set by KRONOS_STREAM_CCXT__CONFIG"
    if kinds & {"AuthenticationError", "RestrictedLocation"} or _RESTRICTED.search(str(error)):
        return VenueRefused(message)
    if kinds & {"RateLimitExceeded", "DDoSProtection", "OnMaintenance"}:
        return SourceError(message, DEFAULT_RETRY_SECONDS)
    return SeriesRefused(message) if "ExchangeError" in kinds else SourceError(message)


def _handshake_status(error: Exception) -> HttpStatusError | None:
    """Status of a refused websocket handshake: ccxt wraps aiohttp's exception."""
    cause = error.args[0] if error.args else None
    status, headers = getattr(cause, "status", None), getattr(cause, "headers", None) or {}
    if status not in RATE_LIMIT_STATUSES | BLOCKED_STATUSES:
        return None
    return HttpStatusError(status, str(cause), headers.get("Retry-After"))


def _status_error(error: HttpStatusError, message: str) -> SourceError:
    if error.status == 451 or _RESTRICTED.search(error.body):
        return VenueRefused(message)
    if error.status in RATE_LIMIT_STATUSES:
        return SourceError(message, parse_retry_after(error.retry_after))
    return SourceError(message, _FORBIDDEN_SECONDS if error.status == 403 else 0.0)


def _describe(error: Exception, redact: Callable[[str], str]) -> str:
    """Short line without secrets."""
    text = redact_parameters(redact(" ".join(str(error).split())))
    return f"{type(error).__name__} {shorten(text, _MAX_ERROR_LENGTH)}".strip()
