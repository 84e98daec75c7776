"""Instances of ccxt's exchange classes, and the requests to them."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import suppress
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from typing import Any, Self, TypeVar

from kronos_connectors.ccxt.errors import translate_error
from kronos_connectors.ccxt.markets import Markets
from kronos_connectors.ccxt.options import CcxtOptions
from kronos_connectors.ccxt.rate_limit import Cooldown
from kronos_connectors.ccxt.strict import Hooks, strict_class
from kronos_stream.interfaces.source import SourceError
from kronos_stream.market.series import Series
from kronos_stream.redaction import Redactor, config_secrets

_T = TypeVar("_T")

PREFIX = "ccxt."
"""Prefix of a venue's name that selects ccxt, even if another connector has that venue."""

_DEFAULT_PAGE_SIZE = 200
"""Rows per request where ccxt does not know the exchange's limit."""

_CACHED_BARS = 8
"""Bars that ccxt keeps of each series; only the newest are used."""

_TYPE_NAMES: dict[type | tuple[type, ...], str] = {
    bool: "true or false",
    (int, float): "a number",
    str: "a string",
    (dict,): "an object",
    (list,): "a list",
}
"""Types of ccxt's attributes, and their names in error messages."""

_STRING_SETTINGS = re.compile(r"(?i)(key|secret|password|uid|token|proxy)$")
"""Settings that are strings, although their default is None."""

_CLOSE_SECONDS = 2.0
_MIN_SECRET_LENGTH = 6
"""Shorter values of the config would mask half of every error message."""

_UNLIMITED = 1_000_000_000


class ExchangeFactory:
    """Creates instances of one exchange, which share its rate limit and its list of markets."""

    def __init__(self, name: str, kind: Any, options: CcxtOptions) -> None:  # noqa: ANN401
        """kind: ccxt's class of the exchange ``name``. Raises SourceError for invalid settings."""
        self.name = name
        self._exchange_class, self._options = strict_class(kind), options
        try:
            _check_types(options.config_for(name), self._exchange_class({}), name)
            self._config = _build_config(options, name)
            self._prototype = self._exchange_class(self._config)
        except SourceError:
            raise
        except Exception as error:  # noqa: BLE001 - its constructors raise anything
            # The message may repeat a secret.
            why = type(error).__name__
            raise SourceError(
                f"KRONOS_STREAM_CCXT__CONFIG: ccxt cannot create {name} with it: {why}"
            ) from None
        self.cooldown = Cooldown(name)
        self._redactor = Redactor(config_secrets(options.config_for(name)), _MIN_SECRET_LENGTH)
        self.rest = ExchangeClient(self._prototype, name, self.cooldown, self._redactor)
        """Client for REST requests."""

    @classmethod
    def for_venue(cls, venue: str, options: CcxtOptions) -> Self:
        """Create the factory of a venue. Raises SourceError if ccxt lacks it or a feature."""
        logging.getLogger("ccxt").setLevel(logging.WARNING)  # below, it logs requests with keys
        for setting, names in (
            ("SYMBOLS", (venue.removeprefix(PREFIX),)),
            ("CCXT__CONFIG", options.configured_exchanges()),
            ("CCXT__FILLS_EMPTY", options.fills_empty),
        ):
            for name in names:
                if name not in exchange_names():
                    raise SourceError(f"KRONOS_STREAM_{setting}: {_unknown_exchange(name)}")
        name = venue.removeprefix(PREFIX)
        modules = (import_module(module) for module in ("ccxt.pro", "ccxt.async_support"))
        factory = cls(
            name,
            next(getattr(module, name) for module in modules if hasattr(module, name)),
            options,
        )
        if factory.rest.has("fetchOHLCV") is not True:
            raise SourceError(f"KRONOS_STREAM_SYMBOLS: {name} has no history of candles in ccxt")
        if options.mode == "watch" and not factory.watch_enabled:
            raise SourceError(
                f"KRONOS_STREAM_CCXT__MODE=watch: ccxt cannot watch candles of {name}; set auto"
            )
        return factory

    @property
    def watch_enabled(self) -> bool:
        """True if candles are watched, not polled."""
        return self._options.mode != "poll" and self.rest.has("watchOHLCV") is True

    @property
    def fills_empty(self) -> bool:
        return self.name in self._options.fills_empty

    def create(self, hooks: Hooks) -> ExchangeClient:
        """Create another instance for watching candles."""
        exchange = self._exchange_class(self._config)
        exchange.hooks = hooks
        exchange.throttler = self._prototype.throttler
        exchange.ssl_context = self._prototype.ssl_context
        # Ping often enough that silence means a broken connection. The pool detects silence by any
        # frame; ccxt would count pongs only, which some exchanges do not send.
        pings = round(self._options.stall_seconds * 1000 / 3)
        pings = min(exchange.streaming.get("keepAlive", pings), pings)
        exchange.streaming = {
            **exchange.streaming,
            "keepAlive": pings,
            "maxPingPongMisses": _UNLIMITED,
        }
        return ExchangeClient(exchange, self.name, self.cooldown, self._redactor)


class ExchangeClient:
    """Instance of ccxt's exchange whose requests raise only SourceError and its subclasses."""

    def __init__(
        self,
        exchange: Any,  # noqa: ANN401 - no types
        name: str,
        cooldown: Cooldown,
        redactor: Redactor,
    ) -> None:
        self._exchange, self._name, self._cooldown = exchange, name, cooldown
        self._redactor = redactor

    def has(self, feature: str) -> object:
        """ccxt's flag of a feature: True, or None, False, "emulated"."""
        return self._exchange.has.get(feature)

    @property
    def timeframes(self) -> Collection[str]:
        return self._exchange.timeframes or {}

    @property
    def markets(self) -> Markets:
        """Markets loaded last; empty before."""
        return self._exchange.markets or {}

    async def load_markets(self) -> None:
        """Reload the markets. Raises SourceError, also if there are none."""
        await self._call(self._exchange.load_markets, True)  # noqa: FBT003 - reload
        if not self.markets:
            raise SourceError(f"{self._name}: its list of markets is empty")

    def copy_markets(self, other: ExchangeClient) -> None:
        """Share the markets that another instance has loaded."""
        if other.markets and self._exchange.markets is not other._exchange.markets:
            self._exchange.set_markets_from_exchange(other._exchange)

    async def server_time(self) -> int:
        """UTC ms by the exchange's clock."""
        time = await self._call(self._exchange.fetch_time)
        if type(time) is not int:
            raise SourceError(f"{self._name}: invalid server time")
        return time

    def page_size(self, symbol: str) -> int:
        """Most rows per request."""
        try:
            limit = self._exchange.feature_value(symbol, "fetchOHLCV", "limit", _DEFAULT_PAGE_SIZE)
        except Exception as error:  # noqa: BLE001 - its tables may have gaps
            raise translate_error(error, self._name, self._redactor.redact) from None
        return limit if type(limit) is int and limit > 1 else _DEFAULT_PAGE_SIZE

    async def fetch_ohlcv(self, series: Series, since: int, limit: int) -> Sequence[object]:
        """Rows from ``since``, UTC ms, on; some exchanges return more, fewer or others."""
        fetch = self._exchange.fetch_ohlcv
        rows: Sequence[object] = await self._call(
            fetch, series.symbol, str(series.timeframe), since, limit
        )
        return rows

    async def watch_ohlcv(self, series: Series) -> Sequence[object]:
        """Wait for a push; returns the newest rows."""
        watching = self._exchange.watch_ohlcv(series.symbol, str(series.timeframe))
        try:
            return list(await watching)
        except Exception as error:  # noqa: BLE001 - as in _call
            raise self._translate_error(error) from None

    async def close(self) -> None:
        """Close all sockets, within a bounded time."""
        for close in (self._exchange.close_ws_clients, self._exchange.close):
            # A socket that does not respond must not keep the session open.
            with suppress(Exception):
                async with asyncio.timeout(_CLOSE_SECONDS):
                    await close()
            self._exchange.clients = {}

    async def _call(self, method: Callable[..., Awaitable[_T]], *args: object) -> _T:
        self._cooldown.check(asyncio.get_running_loop().time())
        try:
            return await method(*args)
        except Exception as error:  # noqa: BLE001 - unexpected responses make ccxt raise anything
            raise self._translate_error(error) from None

    def _translate_error(self, error: Exception) -> SourceError:
        translated = translate_error(error, self._name, self._redactor.redact)
        self._cooldown.record(translated, asyncio.get_running_loop().time())
        return translated


@cache
def exchange_names() -> frozenset[str]:
    """Names of the exchanges that ccxt supports."""
    return frozenset(import_module("ccxt").exchanges)


def _build_config(options: CcxtOptions, name: str) -> dict[str, Any]:
    """Arguments of the constructor of ``name``; ours override the user's."""
    given = options.config_for(name)
    return {
        **given,
        "enableRateLimit": True,
        "newUpdates": False,
        "verbose": False,  # it prints
        "timeout": round(options.timeout_seconds * 1000),
        "enableLastHttpResponse": False,
        "enableLastJsonResponse": False,
        "enableLastResponseHeaders": False,
        "options": {"OHLCVLimit": _CACHED_BARS, **given.get("options", {})},
    }


def _check_types(config: Mapping[str, Any], exchange: Any, name: str) -> None:  # noqa: ANN401
    """Raise SourceError for types that ccxt would accept and fail with later."""
    for key, value in config.items():
        default = "" if _STRING_SETTINGS.search(key) else getattr(exchange, key, None)
        for kind, expected in _TYPE_NAMES.items():
            if isinstance(default, kind) and not isinstance(value, kind):
                raise SourceError(f"KRONOS_STREAM_CCXT__CONFIG: {name}.{key}: expected {expected}")


def _unknown_exchange(name: str) -> str:
    near = get_close_matches(name, sorted(exchange_names()), 1, 0.6)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"ccxt has no exchange {name!r}{hint}"
