"""The messages on the topics, for whoever reads them.

These models are the contract: the JSON Schemas in ``docs/schemas`` and ``docs/asyncapi.json`` are
generated from them, and what :mod:`kronos_stream.forecast.compose` writes is tested against them.
Within a version they only gain optional fields, and readers ignore fields they do not know;
anything else is a new version, and a new topic. Nothing here imports the engine.
"""

from __future__ import annotations

import base64
from typing import Annotated, Any, Literal, Self

import orjson
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, PlainSerializer, model_validator

from kronos_stream.market.utc import rfc3339

FORECAST = "kronos.forecast/1"
REMOVAL = "kronos.removal/1"
DEAD_LETTER = "kronos.deadletter/1"

VOLATILE = frozenset({"created_at", "latency_ms"})
"""The fields of a forecast in which two records with one id may differ."""

Time = Annotated[
    AwareDatetime,
    PlainSerializer(lambda time: rfc3339(round(time.timestamp() * 1000)), str, when_used="json"),
]
"""RFC 3339 in UTC, to the millisecond."""

Bands = dict[str, tuple[float, ...]]
"""The mean (``mean``) and the quantiles (``q05``) of a channel, one number per step."""


class _Base(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="ignore", allow_inf_nan=False, use_attribute_docstrings=True
    )

    def to_dict(self) -> dict[str, Any]:
        """Plain values as in JSON; optional fields that were not given are left out."""
        return self.model_dump(mode="json", by_alias=True, exclude_unset=True)


class _BaseMessage(_Base):
    model_config = ConfigDict(validate_by_alias=True, validate_by_name=True)

    @classmethod
    def parse(cls, value: bytes | str) -> Self:
        """Read a record's value. Raises pydantic.ValidationError, a ValueError."""
        return cls.model_validate_json(value)

    def encode(self) -> bytes:
        """The record's value: what was parsed, without the fields this version does not know."""
        return orjson.dumps(self.to_dict())


class Model(_Base):
    """What forecast."""

    name: str
    """Name on the model hub, folder, or name of a bundled model."""
    revision: str | None
    """Commit on the hub; of a folder, the digest of its weights."""
    tokenizer: str
    """Likewise, of the tokenizer."""
    tokenizer_revision: str | None = None
    """Likewise, of the tokenizer."""


class Engine(_Base):
    """What computed it."""

    version: str
    """Version of kronos-stream."""
    device: str
    """Its kind: cpu, cuda or mps."""
    dtype: str
    """float32 or bfloat16; in float32 on a CPU, the forecast can be recomputed exactly."""


class Sampling(_Base):
    """How the paths were drawn."""

    paths: int
    """Number of sample paths."""
    temperature: float
    """Of the softmax; below 1 narrower bands, above 1 wider."""
    top_k: int
    """Tokens that compete, 0: all."""
    top_p: float
    """Share of the probability that competes (nucleus)."""
    seed: int
    """Fixes the noise, together with the series and the origin."""
    anchor: bool
    """True where prices were scaled so that the model's own view of the origin bar closes at the
    actual close."""


class Context(_Base):
    """What was known: the closed bars that the forecast starts from."""

    bars: int
    """Number of bars, the origin included."""
    first: Time
    """Open of the first bar."""
    synthetic: int
    """Bars among them that the venue does not have: flat, without volume."""
    amount: Literal["reported", "derived"]
    """Whether the venue reports turnover in quote units, or it is volume x mean price."""
    digest: str
    """BLAKE2b (128 bits, hex) of the bars' float32 values, opens, and the scale."""
    scale: float = 1.0
    """What prices were multiplied with for the model, a power of two; published prices are not."""


class Last(_Base):
    """The origin bar, as the venue gave it: prices in quote units, volume in base units."""

    open: float
    """Opening price."""
    high: float
    """Highest price."""
    low: float
    """Lowest price."""
    close: float
    """Closing price: what returns are measured against."""
    volume: float
    """What was traded."""


class Summary(_Base):
    """The final step's close against the origin's, over all paths; null where undefined.

    Returns are close / last close - 1: 0.01 is one per cent.
    """

    p_up: float
    """Share of paths whose final close is above the last."""
    expected_return: float | None
    """Mean of the final return."""
    return_quantiles: dict[str, float | None]
    """Quantiles of the final return by name (q05 is the 5 % quantile)."""
    volatility: float | None
    """Median over paths of the standard deviation of log returns, per bar."""
    value_at_risk_95: float | None
    """Minus the 5 % quantile of the final return: positive is a loss."""


class Latency(_Base):
    """Where the time went between the close of the origin bar and this message, milliseconds."""

    close_to_received: float
    """From the bar's close, by the venue's clock, to its last word on it."""
    queued: float
    """From then until the computation began."""
    compute: float
    """Computation of the batch it was part of."""


class Forecast(_BaseMessage):
    """What may become of one series in the bars after its origin, drawn when that bar closed.

    Columnar: ``close["q05"][0]`` is the 5 % quantile of the close of the bar that opens at
    ``times[0]``. Quantiles stand at Weibull positions i/(m+1) of m paths. Prices are in quote
    units, volumes in base units, numbers in float32's precision. Delivered at least once: records
    with one ``id`` are equal in all but ``created_at`` and ``latency_ms``. Of records with one
    ``origin`` the highest ``revision`` counts.
    """

    schema_: Literal["kronos.forecast/1"] = Field(alias="schema")
    """Name and version of this schema."""
    id: str
    """BLAKE2b (128 bits, hex) of all that the forecast follows from."""
    series: str
    """venue:symbol:timeframe, such as binance:BTC/USDT:5m."""
    venue: str
    """Where the bars come from."""
    symbol: str
    """In ccxt's unified notation."""
    timeframe: str
    """Length of a bar: a count and s, m, h, d, w or M."""
    origin: Time
    """Open of the last closed bar; the forecast begins with the bar after it."""
    revision: int
    """How often the venue changed the origin bar after its close."""
    valid_until: Time
    """Close of the next bar, when the next forecast is due."""
    created_at: Time
    """When this record was made, by the daemon's clock."""
    degraded: bool
    """True where something in the context should not be trusted; see reasons."""
    reasons: tuple[str, ...] = ()
    """Why it is degraded, for people."""
    model: Model
    engine: Engine
    sampling: Sampling
    context: Context
    last: Last
    times: tuple[Time, ...]
    """Opens of the bars ahead, one per step."""
    close: Bands
    """Mean and quantiles of the close by name (mean, q05, q50, …), one number per step."""
    open: Bands
    """Likewise of the open."""
    high: Bands
    """Likewise of the high, per path at least open and close."""
    low: Bands
    """Likewise of the low, per path at most open and close."""
    volume: Bands
    """Likewise of the volume, base units, at least 0."""
    summary: Summary
    repaired: int
    """Candles, of all paths and steps, whose high, low or volume had to be made possible."""
    latency_ms: Latency
    paths: tuple[tuple[float, ...], ...] | None = None
    """Closes of every path, if asked for."""
    other_paths: dict[str, tuple[tuple[float, ...], ...]] | None = None
    """Likewise open, high, low, volume and amount of every path, by channel, if asked for."""

    @model_validator(mode="after")
    def _check_lengths(self) -> Self:
        steps = len(self.times)
        for name in ("close", "open", "high", "low", "volume"):
            for band, numbers in getattr(self, name).items():
                if len(numbers) != steps:
                    raise ValueError(f"{name}.{band} has {len(numbers)} numbers, times {steps}")
        return self


class Removal(_BaseMessage):
    """A series is not forecast any more; what was said of it is out of date.

    On the topic of all forecasts it comes after the series' last. It may be forecast again.
    """

    schema_: Literal["kronos.removal/1"] = Field(alias="schema")
    """Name and version of this schema."""
    id: str
    """BLAKE2b (128 bits, hex) of all other fields."""
    at: Time
    """When it was given up, by the daemon's clock."""
    series: str
    """venue:symbol:timeframe, such as binance:BTC/USDT:5m."""


class DeadLetter(_BaseMessage):
    """Something that could not be processed or delivered, with the reason."""

    schema_: Literal["kronos.deadletter/1"] = Field(alias="schema")
    """Name and version of this schema."""
    id: str
    """BLAKE2b (128 bits, hex) of all other fields."""
    at: Time
    """When it was given up, by the daemon's clock."""
    what: Literal["frame", "candle", "record"]
    """A frame or a candle of a venue, or a record that a sink refused."""
    series: str | None
    """venue:symbol:timeframe, if known."""
    reason: str
    """Why, for people."""
    sink: str | None
    """Which sink refused it, of a record."""
    payload: str
    """What came or was refused, its first 64 KiB."""
    encoding: Literal["text", "base64"]
    """How payload is written: as it was, or in base64 where it was not UTF-8."""
    truncated: bool
    """True where there was more of it."""

    def content(self) -> bytes:
        """The payload's bytes."""
        return (
            base64.b64decode(self.payload) if self.encoding == "base64" else self.payload.encode()
        )


def same_forecast(one: Forecast, other: Forecast) -> bool:
    """Whether two records say the same: equal in all but when and how fast they were made."""
    ours, theirs = (m.model_dump(exclude=set(VOLATILE), exclude_unset=True) for m in (one, other))
    return ours == theirs
