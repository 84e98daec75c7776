"""Models of the messages on the topics, for consumers.

These models are the contract: the JSON Schemas in ``docs/schemas`` and ``docs/asyncapi.json`` are
generated from them, and the output of :mod:`kronos_stream.forecast.compose` is tested against them.
Within a version they only gain optional fields, and readers ignore unknown fields; any other
change is a new version with a new topic. Nothing here imports the engine.
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
"""Fields of a forecast that may differ between two records with the same id."""

Time = Annotated[
    AwareDatetime,
    PlainSerializer(lambda time: rfc3339(round(time.timestamp() * 1000)), str, when_used="json"),
]
"""RFC 3339 in UTC, to the millisecond."""

Bands = dict[str, tuple[float, ...]]
"""Mean (``mean``) and quantiles (such as ``q05``) of a channel, one number per step."""


class _Base(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="ignore", allow_inf_nan=False, use_attribute_docstrings=True
    )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values as in JSON, without optional fields that were not set."""
        return self.model_dump(mode="json", by_alias=True, exclude_unset=True)


class _BaseMessage(_Base):
    model_config = ConfigDict(validate_by_alias=True, validate_by_name=True)

    @classmethod
    def parse(cls, value: bytes | str) -> Self:
        """Parse the value of a record. Raises pydantic.ValidationError, a ValueError."""
        return cls.model_validate_json(value)

    def encode(self) -> bytes:
        """Return the value of a record; unknown fields of a parsed one are left out."""
        return orjson.dumps(self.to_dict())


class Model(_Base):
    """Model that made the forecast."""

    name: str
    """Name on the model hub, folder, or name of a bundled model."""
    revision: str | None
    """Commit on the hub; for a folder, the digest of its weights."""
    tokenizer: str
    """Name or folder of the tokenizer."""
    tokenizer_revision: str | None = None
    """Commit or digest of the tokenizer."""


class Engine(_Base):
    """Software and hardware that computed the forecast."""

    version: str
    """Version of kronos-stream."""
    device: str
    """Kind of device: cpu, cuda or mps."""
    dtype: str
    """float32 or bfloat16; in float32 on a CPU, the forecast can be recomputed exactly."""


class Sampling(_Base):
    """Parameters of the sampling of paths."""

    paths: int
    """Number of sample paths."""
    temperature: float
    """Temperature of the softmax; below 1 gives narrower bands, above 1 wider ones."""
    top_k: int
    """Number of most probable tokens to sample from; 0 means all."""
    top_p: float
    """Probability mass to sample from (nucleus sampling)."""
    seed: int
    """Seed of the noise, together with the series and the origin."""
    anchor: bool
    """True if prices were scaled so that the model's reconstruction of the origin bar has the
    actual close."""


class Context(_Base):
    """Closed bars that the forecast was made from."""

    bars: int
    """Number of bars, the origin included."""
    first: Time
    """Open of the first bar."""
    synthetic: int
    """Number of bars that the venue does not have: flat, without volume."""
    amount: Literal["reported", "derived"]
    """Turnover in quote units: reported by the venue, or derived as volume x mean price."""
    digest: str
    """BLAKE2b (128 bits, hex) of the bars' float32 values, open times, and the scale."""
    scale: float = 1.0
    """Factor applied to prices for the model, a power of two; published prices are not scaled."""


class Last(_Base):
    """Origin bar as reported by the venue: prices in quote units, volume in base units."""

    open: float
    """Opening price."""
    high: float
    """Highest price."""
    low: float
    """Lowest price."""
    close: float
    """Closing price, the base of all returns."""
    volume: float
    """Traded volume."""


class Summary(_Base):
    """Statistics of the last step's close relative to the origin's; null where undefined.

    Returns are close / last close - 1: 0.01 is one per cent.
    """

    p_up: float
    """Share of paths whose final close is above the last close."""
    expected_return: float | None
    """Mean of the final return."""
    return_quantiles: dict[str, float | None]
    """Quantiles of the final return by name (q05 is the 5 % quantile)."""
    volatility: float | None
    """Median over paths of the standard deviation of log returns, per bar."""
    value_at_risk_95: float | None
    """Negative 5 % quantile of the final return; a positive number is a loss."""


class Latency(_Base):
    """Parts of the time from the close of the origin bar to this message, in milliseconds."""

    close_to_received: float
    """From the close, by the venue's clock, to the arrival of the bar's last update."""
    queued: float
    """From the arrival to the start of the computation."""
    compute: float
    """Computation of the whole batch."""


class Forecast(_BaseMessage):
    """Probabilistic forecast of one series for the bars after its origin bar.

    Columnar: ``close["q05"][0]`` is the 5 % quantile of the close of the bar that opens at
    ``times[0]``. Quantiles use Weibull positions i/(m+1) of m paths. Prices are in quote units,
    volumes in base units, numbers in float32's precision. Delivery is at least once: records with
    the same ``id`` differ only in ``created_at`` and ``latency_ms``. Of records with the same
    ``origin`` the one with the highest ``revision`` is valid.
    """

    schema_: Literal["kronos.forecast/1"] = Field(alias="schema")
    """Name and version of this schema."""
    id: str
    """BLAKE2b (128 bits, hex) of all inputs of the forecast."""
    series: str
    """venue:symbol:timeframe, such as binance:BTC/USDT:5m."""
    venue: str
    """Source of the bars."""
    symbol: str
    """Symbol in ccxt's unified notation."""
    timeframe: str
    """Length of a bar: a number and s, m, h, d, w or M."""
    origin: Time
    """Open of the last closed bar; the forecast begins with the bar after it."""
    revision: int
    """Number of corrections of the origin bar after its close."""
    valid_until: Time
    """Close of the next bar, when the next forecast is due."""
    created_at: Time
    """Creation of this record, by the daemon's clock."""
    degraded: bool
    """True if the context has defects; see reasons."""
    reasons: tuple[str, ...] = ()
    """Defects of the context, as text."""
    model: Model
    engine: Engine
    sampling: Sampling
    context: Context
    last: Last
    times: tuple[Time, ...]
    """Open times of the forecast bars, one per step."""
    close: Bands
    """Mean and quantiles of the close by name (mean, q05, q50, …), one number per step."""
    open: Bands
    """Mean and quantiles of the open."""
    high: Bands
    """Mean and quantiles of the high; in each path it is at least open and close."""
    low: Bands
    """Mean and quantiles of the low; in each path it is at most open and close."""
    volume: Bands
    """Mean and quantiles of the volume in base units, at least 0."""
    summary: Summary
    repaired: int
    """Number of candles, over all paths and steps, whose high, low or volume was corrected to a
    possible value."""
    latency_ms: Latency
    paths: tuple[tuple[float, ...], ...] | None = None
    """Closes of every path, if enabled."""
    other_paths: dict[str, tuple[tuple[float, ...], ...]] | None = None
    """Open, high, low, volume and amount of every path, by channel, if enabled."""

    @model_validator(mode="after")
    def _check_lengths(self) -> Self:
        steps = len(self.times)
        for name in ("close", "open", "high", "low", "volume"):
            for band, numbers in getattr(self, name).items():
                if len(numbers) != steps:
                    raise ValueError(f"{name}.{band} has {len(numbers)} numbers, times {steps}")
        return self


class Removal(_BaseMessage):
    """A series is no longer forecast; its earlier forecasts are obsolete.

    On the topic of all forecasts it follows the last forecast of the series, which may be resumed.
    """

    schema_: Literal["kronos.removal/1"] = Field(alias="schema")
    """Name and version of this schema."""
    id: str
    """BLAKE2b (128 bits, hex) of all other fields."""
    at: Time
    """Time of the removal, by the daemon's clock."""
    series: str
    """venue:symbol:timeframe, such as binance:BTC/USDT:5m."""


class DeadLetter(_BaseMessage):
    """Data that could not be processed or delivered, with the reason."""

    schema_: Literal["kronos.deadletter/1"] = Field(alias="schema")
    """Name and version of this schema."""
    id: str
    """BLAKE2b (128 bits, hex) of all other fields."""
    at: Time
    """Creation of this record, by the daemon's clock."""
    what: Literal["frame", "candle", "record"]
    """A frame or candle from a venue, or a record that a sink refused."""
    series: str | None
    """venue:symbol:timeframe, if known."""
    reason: str
    """Reason, as text."""
    sink: str | None
    """Sink that refused the record."""
    payload: str
    """First 64 KiB of the data."""
    encoding: Literal["text", "base64"]
    """Encoding of payload: text, or base64 if the data is not UTF-8."""
    truncated: bool
    """True if the data was longer than payload."""

    def content(self) -> bytes:
        """Return the payload as bytes."""
        return (
            base64.b64decode(self.payload) if self.encoding == "base64" else self.payload.encode()
        )


def same_forecast(one: Forecast, other: Forecast) -> bool:
    """Return whether two records differ at most in creation time and latency."""
    ours, theirs = (m.model_dump(exclude=set(VOLATILE), exclude_unset=True) for m in (one, other))
    return ours == theirs
