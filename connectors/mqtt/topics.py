"""Topics from templates such as ``kronos/candles/{venue}/{symbol}/{timeframe}``.

Special characters in a field (``/``, ``+``, ``#``, ``%``) are percent-encoded: BTC/USDT becomes
``BTC%2FUSDT``.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from string import Formatter

from kronos_stream.market.series import Series

SERIES_FIELDS = frozenset({"venue", "symbol", "timeframe"})
"""Template fields of a series."""

_SPECIAL = re.compile("[%/+#]")
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f]")
_MAX_BYTES = 65_535


class TopicTemplate:
    """A valid template."""

    def __init__(
        self, text: str, *, required: Collection[str] = (), allowed: Collection[str] = ()
    ) -> None:
        """Raise ValueError if a required field is missing, or a field is not allowed."""
        self._parts: list[tuple[str, str | None]] = []
        for literal, field, spec, conversion in _parse(text):
            if spec or conversion or (field is not None and field not in allowed):
                raise ValueError(f"{text!r}: {_describe_fields(allowed)}")
            if bad := set(literal) & {"+", "#"}:
                raise ValueError(f"{text!r}: {bad.pop()} is a wildcard, but one topic is needed")
            self._parts.append((literal, field))
        if missing := sorted(set(required) - {field for _, field in self._parts}):
            lacking = " and ".join(f"{{{field}}}" for field in missing)
            raise ValueError(f"{text!r} lacks {lacking}: different series would share a topic")
        if not text or text.startswith("$"):
            raise ValueError(
                f"{text!r}: a topic must not be empty or begin with $, which is for the broker"
            )
        if reason := invalid_reason(text):
            raise ValueError(f"{text!r}: {reason}")

    def render(self, **fields: str) -> str:
        return "".join(
            literal + ("" if field is None else encode_level(fields[field]))
            for literal, field in self._parts
        )

    def for_series(self, series: Series) -> str:
        return self.render(
            venue=series.venue, symbol=series.symbol, timeframe=str(series.timeframe)
        )


def encode_level(text: str) -> str:
    """Encode ``text`` as one level of a topic."""
    return _SPECIAL.sub(lambda found: f"%{ord(found[0]):02X}", text)


def invalid_reason(topic: str) -> str | None:
    """Why a topic is invalid, or None."""
    if found := _UNPRINTABLE.search(topic):
        return f"a topic cannot contain the control character U+{ord(found[0]):04X}"
    try:
        size = len(topic.encode())
    except UnicodeEncodeError:
        return "a topic cannot contain half of a surrogate pair"
    if size > _MAX_BYTES:
        return f"a topic of {size:,} bytes is over the limit of {_MAX_BYTES:,}"
    return None


def _parse(text: str) -> list[tuple[str, str | None, str | None, str | None]]:
    try:
        return list(Formatter().parse(text))
    except ValueError as error:
        raise ValueError(f"{text!r}: {error}") from None


def _describe_fields(allowed: Collection[str]) -> str:
    if not allowed:
        return "this topic has no fields in braces"
    return "fields are " + ", ".join(f"{{{field}}}" for field in sorted(allowed))
