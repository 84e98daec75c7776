"""Settings of ccxt: ``KRONOS_STREAM_CCXT__*``."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal

import orjson
from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator

Mode = Literal["auto", "watch", "poll"]


class CcxtOptions(BaseModel):
    """Settings of all exchanges that ccxt serves; where candles are public, no key is needed."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    mode: Mode = "auto"
    """watch: candles are pushed; poll: requested at each close; auto: watch if ccxt can."""
    config: SecretStr = SecretStr("")
    """Arguments of ccxt's constructors as JSON, by exchange: {"kraken": {"apiKey": "..."}}."""
    fills_empty: tuple[str, ...] = ("binance", "binancecoinm", "binanceus", "binanceusdm")
    """Exchanges that have a flat bar where nothing was traded; the others have no bar."""
    shard_size: int = Field(default=50, ge=1, le=200)
    """Series watched by one client of ccxt."""
    restart_hours: float = Field(default=6.0, gt=0, le=168)
    """A client is replaced at about this age, as ccxt has leaked memory before."""
    stall_seconds: float = Field(default=30.0, ge=5, le=600)
    """A client that receives nothing for this long, not even a pong, is replaced."""
    settle_seconds: float = Field(default=1.0, ge=0, le=30)
    """Delay after its close before a bar is requested, as responses may come from a cache."""
    timeout_seconds: float = Field(default=20.0, ge=1, le=100)
    """Time limit for a complete response."""

    @field_validator("config")
    @classmethod
    def _is_json(cls, value: SecretStr) -> SecretStr:
        _parse_config(value)
        return value

    def config_for(self, exchange: str) -> dict[str, Any]:
        """Arguments of the constructor of ``exchange``."""
        return _parse_config(self.config).get(exchange, {})

    def configured_exchanges(self) -> Collection[str]:
        """Exchanges that have arguments."""
        return _parse_config(self.config)


def _parse_config(config: SecretStr) -> dict[str, dict[str, Any]]:
    text = config.get_secret_value()
    # Errors do not quote the text: it may hold keys.
    try:
        given = orjson.loads(text) if text else {}
    except orjson.JSONDecodeError as error:
        raise ValueError(f"not JSON: line {error.lineno}, column {error.colno}") from None
    if not isinstance(given, dict) or not all(isinstance(one, dict) for one in given.values()):
        raise ValueError('expected an object for each exchange, such as {"kraken": {…}}')
    return given
