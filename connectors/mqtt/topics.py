"""Topics out of templates: ``kronos/candles/{venue}/{symbol}/{timeframe}``.

What a topic gives a meaning (``/``, ``+``, ``#``) stands percent-encoded in a part of it, and so
does the percent sign itself: BTC/USDT is ``BTC%2FUSDT``.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from string import Formatter

from kronos_stream.market.series import Series

SERIES_FIELDS = frozenset({"venue", "symbol", "timeframe"})
"""The fields that a series fills."""

_SPECIAL = re.compile("[%/+#]")
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f]")
_MAX_BYTES = 65_535


class TopicTemplate:
    """A checked template. Raises ValueError, for people."""

    def __init__(
        self, text: str, *, required: Collection[str] = (), allowed: Collection[str] = ()
    ) -> None:
        """needed: fields without which two topics would be one. known: what may stand there."""
        self._parts: list[tuple[str, str | None]] = []
        for literal, field, spec, conversion in _parse(text):
            if spec or conversion or (field is not None and field not in allowed):
                raise ValueError(f"{text!r}: {_describe_fields(allowed)}")
            if bad := set(literal) & {"+", "#"}:
                raise ValueError(f"{text!r}: {bad.pop()} is a wildcard; name one topic")
            self._parts.append((literal, field))
        if missing := sorted(set(required) - {field for _, field in self._parts}):
            lacking = " and ".join(f"{{{field}}}" for field in missing)
            raise ValueError(f"{text!r} lacks {lacking}: different series would share a topic")
        if not text or text.startswith("$"):
            raise ValueError(
                f"{text!r}: a topic has a name, and what begins with $ is the broker's"
            )
        if reason := invalid_reason(text):
            raise ValueError(f"{text!r}: {reason}")

    def render(self, **fields: str) -> str:
        """The topic."""
        return "".join(
            literal + ("" if field is None else encode_level(fields[field]))
            for literal, field in self._parts
        )

    def for_series(self, series: Series) -> str:
        """The topic of a series."""
        return self.render(
            venue=series.venue, symbol=series.symbol, timeframe=str(series.timeframe)
        )


def encode_level(text: str) -> str:
    """``text`` as one level of a topic."""
    return _SPECIAL.sub(lambda found: f"%{ord(found[0]):02X}", text)


def invalid_reason(topic: str) -> str | None:
    """Why no broker would take this topic: one clause for people, or None."""
    if found := _UNPRINTABLE.search(topic):
        return f"a topic cannot hold the control character U+{ord(found[0]):04X}"
    try:
        size = len(topic.encode())
    except UnicodeEncodeError:
        return "a topic cannot hold half of a surrogate pair"
    if size > _MAX_BYTES:
        return f"as a topic it would have {size:,} bytes, and {_MAX_BYTES:,} is the limit"
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
