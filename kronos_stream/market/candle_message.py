"""A candle as a message: what producers send by Kafka or MQTT, one JSON object each.

::

    {"series": "kafka:BTC/USDT:1m", "time": "2024-06-18T11:15:00Z",
     "open": 65000.0, "high": 65010.5, "low": 64990.0, "close": 65005.0, "volume": 12.5}
"""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

import orjson
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema

from kronos_stream.market.candle import Bar, Candle, Update
from kronos_stream.market.series import Series
from kronos_stream.market.utc import parse_time, rfc3339

CANDLE = "kronos.candle/1"

_MAX_TIME_MS = 253_402_300_800_000
"""The year 10000, where written times end."""


class CandleMessageError(ValueError):
    """Not a candle; one clause for people. ``series`` is that of the message, if it is known."""

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
    """A closed bar as role ingest passes it on."""

    series: Series
    bar: Bar
    history: bool
    """Whether it only fills contexts: nobody is to forecast from it."""


class CandleMessage(BaseModel):
    """One bar: in prices, and volume in base units."""

    model_config = ConfigDict(
        frozen=True, extra="ignore", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    schema_: Literal["kronos.candle/1"] = Field(default="kronos.candle/1", alias="schema")
    """The version of this format."""
    series: str | None = None
    """Such as kafka:BTC/USDT:5m; may be left out where the record's key or topic says it."""
    time: Timestamp
    """The bar's open: RFC 3339 (no zone means UTC), or UTC milliseconds."""
    open: float
    """Opening price."""
    high: float
    """Highest price."""
    low: float
    """Lowest price."""
    close: float
    """Closing price."""
    volume: float
    """What was traded, in base units."""
    amount: float | None = None
    """What was traded, in quote units; left out where it is not known."""
    closed: bool = True
    """False for a bar that is still open: a sign of life, never forecast from."""
    revision: int = Field(default=0, ge=0, lt=2**31)
    """How often the venue changed the bar after its close; a higher one supersedes."""
    synthetic: bool = False
    """True where the venue has no such bar: flat, without volume. Without received, it could not
    be had so far, and may yet come."""
    received: Timestamp | None = None
    """When the venue's last word on it came."""
    history: bool = False
    """True for a bar that closed before its series was followed, or before what went before it
    was known: it fills contexts, and is not forecast from."""


def decode_update(value: bytes, series: Series | None, received: int) -> Update:
    """Read a message. Raises WireError.

    series: what the record's key or topic says; the message may repeat it, not contradict it.
    received: UTC ms. Whether the values can be is the tape's to judge.
    """
    message, series = _parse(value, series)
    return Update(series, _candle(message), message.closed, received)


def decode_bar(value: bytes, series: Series | None) -> RelayedBar | None:
    """Read a message for its closed bar; None if it is still open. Raises WireError.

    series: what the record's key says.
    """
    message, series = _parse(value, series)
    if not message.closed:
        return None
    candle = _candle(message)
    if (fault := candle.invalid_reason()) is not None:
        raise CandleMessageError(fault, series)
    bar = Bar(candle, message.revision, message.synthetic, message.received or 0)
    return RelayedBar(series, bar, message.history)


def encode_candle(series: Series, candle: Candle, *, closed: bool = True) -> bytes:
    """The message of a candle."""
    return orjson.dumps({**_fields(series, candle), "closed": closed})


def encode_bar(series: Series, bar: Bar, *, history: bool) -> bytes:
    """The message of a closed bar that :func:`relayed` reads."""
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
            said = Series.parse(message.series)
        except ValueError as error:
            raise CandleMessageError(str(error), series) from None
        if series is not None and said != series:
            raise CandleMessageError(f"it says series {said}, its key or topic {series}", series)
        series = said
    if series is None:
        raise CandleMessageError(
            "neither the message nor its key or topic says which series it is of"
        )
    return message, series


def _candle(message: CandleMessage) -> Candle:
    return Candle(
        message.time,
        message.open,
        message.high,
        message.low,
        message.close,
        message.volume,
        message.amount,
    )


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
