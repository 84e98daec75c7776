"""A candle as a message: what producers send by Kafka or MQTT, one JSON object each.

::

    {"series": "kafka:BTC/USDT:1m", "time": "2024-06-18T11:15:00Z",
     "open": 65000.0, "high": 65010.5, "low": 64990.0, "close": 65005.0, "volume": 12.5}
"""

from __future__ import annotations

from typing import Annotated, Literal

import orjson
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema

from kronos_stream.market.candle import Candle, Update
from kronos_stream.market.series import Series
from kronos_stream.market.utc import parse_time, rfc3339

CANDLE = "kronos.candle/1"

_LATEST_MS = 253_402_300_800_000
"""The year 10000, where written times end."""


class WireError(ValueError):
    """Not a candle; one clause for people. ``series`` is that of the message, if it is known."""

    def __init__(self, message: str, series: Series | None = None) -> None:
        super().__init__(message)
        self.series = series


def _milliseconds(value: object) -> object:
    return parse_time(value) if isinstance(value, str) else value


class CandleMessage(BaseModel):
    """One bar: in prices, and volume in base units."""

    model_config = ConfigDict(
        frozen=True, extra="ignore", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    schema_: Literal["kronos.candle/1"] = Field(default="kronos.candle/1", alias="schema")
    """The version of this format."""
    series: str | None = None
    """Such as kafka:BTC/USDT:5m; may be left out where the record's key or topic says it."""
    time: Annotated[
        int,
        BeforeValidator(_milliseconds),
        Field(ge=0, lt=_LATEST_MS),
        WithJsonSchema(
            {
                "anyOf": [
                    {"type": "string", "format": "date-time"},
                    {"type": "integer", "minimum": 0, "exclusiveMaximum": _LATEST_MS},
                ]
            }
        ),
    ]
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


def decode(value: bytes, series: Series | None, received: int) -> Update:
    """Read a message. Raises WireError.

    series: what the record's key or topic says; the message may repeat it, not contradict it.
    received: UTC ms. Whether the values can be is the tape's to judge.
    """
    try:
        message = CandleMessage.model_validate_json(value)
    except ValidationError as error:
        raise WireError(_explain(error), series) from None
    if message.series is not None:
        try:
            said = Series.parse(message.series)
        except ValueError as error:
            raise WireError(str(error), series) from None
        if series is not None and said != series:
            raise WireError(f"it says series {said}, its key or topic {series}", series)
        series = said
    if series is None:
        raise WireError("neither the message nor its key or topic says which series it is of")
    candle = Candle(
        message.time,
        message.open,
        message.high,
        message.low,
        message.close,
        message.volume,
        message.amount,
    )
    return Update(series, candle, message.closed, received)


def encode(series: Series, candle: Candle, *, closed: bool = True) -> bytes:
    """The message of a candle."""
    fields = candle._asdict()
    if candle.amount is None:
        del fields["amount"]
    fields["time"] = rfc3339(candle.time)
    return orjson.dumps({"schema": CANDLE, "series": series.name, **fields, "closed": closed})


def _explain(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(map(str, first["loc"]))
    reason = first["msg"].removeprefix("Value error, ")
    return f"{where}: {reason}" if where else reason
