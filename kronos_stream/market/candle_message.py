"""Candle messages, one JSON object each, as producers send them by Kafka or MQTT.

::

    {"series": "kafka:BTC/USDT:1m", "time": "2024-06-18T11:15:00Z",
     "open": 65000.0, "high": 65010.5, "low": 64990.0, "close": 65005.0, "volume": 12.5}
"""

from __future__ import annotations

from operator import attrgetter
from typing import Annotated, Literal, NamedTuple

import orjson
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema

from kronos_stream.market.candle import Bar, Candle, Update
from kronos_stream.market.series import Series
from kronos_stream.market.utc import parse_time, rfc3339

CANDLE = "kronos.candle/1"

_MAX_TIME_MS = 253_402_300_800_000
"""The year 10000, the end of RFC 3339."""


class CandleMessageError(ValueError):
    """An invalid candle message; one clause. ``series``: that of the message, if known."""

    def __init__(self, message: str, series: Series | None = None) -> None:
        super().__init__(message)
        self.series = series


def _milliseconds(value: object) -> object:
    return parse_time(value) if isinstance(value, str) else value


Timestamp = Annotated[
    int,
    BeforeValidator(_milliseconds),
    Field(ge=0, lt=_MAX_TIME_MS),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "format": "date-time"},
                {"type": "integer", "minimum": 0, "exclusiveMaximum": _MAX_TIME_MS},
            ]
        }
    ),
]
"""UTC ms; written as RFC 3339."""


class RelayedBar(NamedTuple):
    """A closed bar from role ingest."""

    series: Series
    bar: Bar
    history: bool
    """True if it only fills contexts and triggers no forecast."""


class CandleMessage(BaseModel):
    """One bar of a series."""

    model_config = ConfigDict(
        frozen=True, extra="ignore", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    schema_: Literal["kronos.candle/1"] = Field(default="kronos.candle/1", alias="schema")
    """Version of this format."""
    series: str | None = None
    """Such as kafka:BTC/USDT:5m; optional if the record's key or topic names it."""
    time: Timestamp
    """Open time: RFC 3339 (no zone means UTC), or UTC milliseconds."""
    open: float
    """Opening price."""
    high: float
    """Highest price."""
    low: float
    """Lowest price."""
    close: float
    """Closing price."""
    volume: float
    """Traded volume in base units."""
    amount: float | None = None
    """Traded volume in quote units; absent if not known."""
    closed: bool = True
    """False for a bar that is still open: shows that the venue is alive, triggers no forecast."""
    revision: int = Field(default=0, ge=0, lt=2**31)
    """Number of corrections after the bar's close; a higher one supersedes."""
    synthetic: bool = False
    """True if the venue has no such bar: flat, without volume. Without received, the bar could not
    be fetched so far and may still come."""
    received: Timestamp | None = None
    """Time when its present content was received from the venue."""
    history: bool = False
    """True for a bar that closed before its series was subscribed, or before the bars preceding it
    were known: it fills contexts and triggers no forecast."""


def decode_update(value: bytes, series: Series | None, received: int) -> Update:
    """Decode a message; its values are not validated. Raises CandleMessageError.

    series: as named by the record's key or topic; the message may repeat, not contradict it.
    received: UTC ms.
    """
    message, series = _parse(value, series)
    return Update(series, _candle(message), message.closed, received)


def decode_bar(value: bytes, series: Series | None) -> RelayedBar | None:
    """Decode and validate a closed bar; None if it is still open. Raises CandleMessageError.

    series: as named by the record's key.
    """
    message, series = _parse(value, series)
    if not message.closed:
        return None
    candle = _candle(message)
    if (reason := candle.invalid_reason()) is not None:
        raise CandleMessageError(reason, series)
    bar = Bar(candle, message.revision, message.synthetic, message.received or 0)
    return RelayedBar(series, bar, message.history)


def encode_candle(series: Series, candle: Candle, *, closed: bool = True) -> bytes:
    """Encode the message of a candle."""
    return orjson.dumps({**_fields(series, candle), "closed": closed})


def encode_bar(series: Series, bar: Bar, *, history: bool) -> bytes:
    """Encode the message of a closed bar that :func:`decode_bar` reads."""
    fields = _fields(series, bar.candle) | {"closed": True, "revision": bar.revision}
    if bar.synthetic:
        fields["synthetic"] = True
    if bar.received:
        fields["received"] = rfc3339(bar.received)
    if history:
        fields["history"] = True
    return orjson.dumps(fields)


def _parse(value: bytes, series: Series | None) -> tuple[CandleMessage, Series]:
    try:
        message = CandleMessage.model_validate_json(value)
    except ValidationError as error:
        raise CandleMessageError(_explain(error), series) from None
    if message.series is not None and (series is None or message.series != series.name):
        try:
            named = Series.parse(message.series)
        except ValueError as error:
            raise CandleMessageError(str(error), series) from None
        if series is not None and named != series:
            reason = f"the message names series {named}, its key or topic {series}"
            raise CandleMessageError(reason, series)
        series = named
    if series is None:
        raise CandleMessageError("neither the message nor its key or topic names the series")
    return message, series


_candle_values = attrgetter(*Candle._fields)


def _candle(message: CandleMessage) -> Candle:
    return Candle._make(_candle_values(message))


def _fields(series: Series, candle: Candle) -> dict[str, object]:
    fields = candle._asdict()
    if candle.amount is None:
        del fields["amount"]
    fields["time"] = rfc3339(candle.time)
    return {"schema": CANDLE, "series": series.name, **fields}


def _explain(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(map(str, first["loc"]))
    reason = first["msg"].removeprefix("Value error, ")
    return f"{where}: {reason}" if where else reason
