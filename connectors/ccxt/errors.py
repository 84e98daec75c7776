"""What ccxt's exceptions mean to us: wait, try again, leave a series aside, or give up a venue."""

from __future__ import annotations

import re
from collections.abc import Callable

from kronos_stream.interfaces.source import SourceError, VenueRefused

_DEFAULT_RETRY_SECONDS = 60.0
"""To wait after too many requests where the exchange does not say how long."""

_FORBIDDEN_SECONDS = 600.0
"""To wait after HTTP 403, which exchanges answer both to wrong addresses and to hasty ones."""

_MAX_RETRY_SECONDS = 3 * 86_400.0

_MAX_ERROR_CHARACTERS = 200

_PLACE = r"(countr|region|location|jurisdiction|territor)"
_RESTRICTED = re.compile(
    rf"(restricted|prohibited|unsupported|ineligible) {_PLACE}"
    rf"|(not|un)\W?(available|supported|permitted|allowed) (in|from|for) (your|this) {_PLACE}",
    re.IGNORECASE,
)
_SECRETS = re.compile(r"(?i)\b(api[-_]?key|key|secret|sign(ature)?|token|password)=[^&\s]+")


class HttpStatusError(Exception):
    """An HTTP status by which an exchange means more than ccxt tells."""

    def __init__(self, status: int, body: str, retry_after: str | None = None) -> None:
        super().__init__(f"HTTP {status} {body}")
        self.status, self.body, self.retry_after = status, body, retry_after


class SeriesRefused(SourceError):  # noqa: N818 - as VenueRefused is
    """The exchange, or ccxt, will not do what was asked for this series; others may do."""


def translate_error(
    error: Exception, venue: str, redact: Callable[[str], str] = lambda text: text
) -> SourceError:
    """``error``, raised while ccxt spoke with ``venue``, in our terms.

    without: takes out of a text what must not be seen.

    SeriesRefused where it may be about the series alone, VenueRefused where there is no hope;
    otherwise it is to be tried again, after :attr:`SourceError.retry_after`.
    """
    if isinstance(error, SourceError):
        return error
    said = f"{venue}: {_describe(error, redact)}"
    status = error if isinstance(error, HttpStatusError) else _handshake_status(error)
    if status is not None:
        return _status_error(status, said)
    # By name: this needs no ccxt, and ccxt has each class twice.
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if "AuthenticationError" in kinds:
        said += "; keys are set by KRONOS_STREAM_CCXT__CONFIG"
    if kinds & {"AuthenticationError", "RestrictedLocation"} or _RESTRICTED.search(str(error)):
        return VenueRefused(said)
    if kinds & {"RateLimitExceeded", "DDoSProtection", "OnMaintenance"}:
        return SourceError(said, _DEFAULT_RETRY_SECONDS)
    return SeriesRefused(said) if "ExchangeError" in kinds else SourceError(said)


def _handshake_status(error: Exception) -> HttpStatusError | None:
    """The status that a websocket was refused with: ccxt wraps up what aiohttp raised."""
    cause = error.args[0] if error.args else None
    status, headers = getattr(cause, "status", None), getattr(cause, "headers", None) or {}
    if status not in {403, 418, 429, 451}:
        return None
    return HttpStatusError(status, str(cause), headers.get("Retry-After"))


def _status_error(error: HttpStatusError, said: str) -> SourceError:
    if error.status == 451 or _RESTRICTED.search(error.body):
        return VenueRefused(said)
    if error.status in {418, 429}:
        return SourceError(said, _parse_retry_after(error.retry_after))
    return SourceError(said, _FORBIDDEN_SECONDS if error.status == 403 else 0.0)


def _parse_retry_after(text: str | None) -> float:
    """What a ``Retry-After`` header asks for."""
    if text is None or not (text.isascii() and text.isdecimal() and len(text) < 10):
        return _DEFAULT_RETRY_SECONDS
    return min(max(float(text), 1.0), _MAX_RETRY_SECONDS)


def _describe(error: Exception, redact: Callable[[str], str]) -> str:
    """One line, short, without what may be secret in a URL."""
    text = _SECRETS.sub(r"\1=***", redact(" ".join(str(error).split())))
    short = text if len(text) <= _MAX_ERROR_CHARACTERS else f"{text[:_MAX_ERROR_CHARACTERS]}…"
    return f"{type(error).__name__} {short}".strip()
