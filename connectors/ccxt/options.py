"""How to use ccxt: ``KRONOS_STREAM_CCXT__*``."""

from __future__ import annotations

from collections.abc import Collection
from random import Random
from typing import Any, Literal

import orjson
from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator

from kronos_stream.interfaces.source import Source
from kronos_stream.market.clock import Clock

Mode = Literal["auto", "watch", "poll"]


class CcxtOptions(BaseModel):
    """Settings of all exchanges that ccxt serves. No key is needed where candles are public."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    mode: Mode = "auto"
    """watch: candles are pushed; poll: asked for at each close; auto: watched where ccxt can."""
    config: SecretStr = SecretStr("")
    """What ccxt's constructors are told, by exchange, as JSON: {"kraken": {"apiKey": "..."}}."""
    fills_empty: tuple[str, ...] = ("binance", "binancecoinm", "binanceus", "binanceusdm")
    """Exchanges that have a flat bar where nothing was traded; the others have none there."""
    shard_size: int = Field(default=50, ge=1, le=200)
    """Series watched by one client of ccxt."""
    restart_hours: float = Field(default=6.0, gt=0, le=168)
    """A client is replaced at about this age, as ccxt has leaked memory before."""
    stall_seconds: float = Field(default=30.0, ge=5, le=600)
    """A client that has heard nothing at all for so long, pings included, is replaced."""
    settle_seconds: float = Field(default=1.0, ge=0, le=30)
    """How long after its close a bar is not asked for: answers may come from a cache."""
    timeout_seconds: float = Field(default=20.0, ge=1, le=100)
    """For an answer to be complete."""

    @field_validator("config")
    @classmethod
    def _is_json(cls, value: SecretStr) -> SecretStr:
        _parse_config(value)
        return value

    def config_for(self, exchange: str) -> dict[str, Any]:
        """What the constructor of ``exchange`` is told."""
        return _parse_config(self.config).get(exchange, {})

    def configured_exchanges(self) -> Collection[str]:
        """The exchanges that are told something."""
        return _parse_config(self.config)


def _parse_config(config: SecretStr) -> dict[str, dict[str, Any]]:
    text = config.get_secret_value()
    # What is wrong is said without what stands there: it may be a key.
    try:
        given = orjson.loads(text) if text else {}
    except orjson.JSONDecodeError as error:
        raise ValueError(f"not JSON: line {error.lineno}, column {error.colno}") from None
    if not isinstance(given, dict) or not all(isinstance(one, dict) for one in given.values()):
        raise ValueError('expected an object for each exchange, such as {"kraken": {…}}')
    return given


def build(venue: str, options: CcxtOptions, clock: Clock, random: Random) -> Source:
    """The source of an exchange, by its name in ccxt, or by that behind ``ccxt.``.

    It connects when it runs. Raises SourceError where ccxt does not have what is asked for.
    """
    # Not above: help reads the options, and ccxt takes seconds to import.
    from kronos_connectors.ccxt.exchange import ExchangeFactory
    from kronos_connectors.ccxt.source import CcxtSource

    return CcxtSource(venue, ExchangeFactory.for_venue(venue, options), options, clock, random)


def venues() -> Collection[str]:
    """The exchanges that ccxt knows."""
    from kronos_connectors.ccxt.exchange import exchange_names

    return exchange_names()
