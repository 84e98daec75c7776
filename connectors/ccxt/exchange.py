"""ccxt itself: instances of an exchange, what is asked of them, and what they do not tell."""

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
from kronos_connectors.ccxt.redaction import Redactor
from kronos_connectors.ccxt.strict import Hooks, strict_class
from kronos_stream.interfaces.source import SourceError
from kronos_stream.market.series import Series

_T = TypeVar("_T")

PREFIX = "ccxt."
"""Before an exchange's name in a venue's: ccxt is to serve it, whoever else could."""

_DEFAULT_PAGE_SIZE = 200
"""Rows asked for at a time where ccxt does not know how many there may be."""

_CACHED_BARS = 8
"""Bars that ccxt keeps of each series; nobody looks at more than the newest."""

_TYPE_NAMES: dict[type | tuple[type, ...], str] = {
    bool: "true or false",
    (int, float): "a number",
    str: "a text",
    (dict,): "an object",
    (list,): "a list",
}
"""What ccxt's attributes are, and how JSON calls them."""
_STRING_SETTINGS = re.compile(r"(?i)(key|secret|password|uid|token|proxy)$")
"""What is nothing by default, and a text otherwise."""

_CLOSE_SECONDS = 2.0
_UNLIMITED = 1_000_000_000


class ExchangeFactory:
    """Makes instances of one exchange, which share its rate limit and its list of markets."""

    def __init__(self, name: str, kind: Any, options: CcxtOptions) -> None:  # noqa: ANN401
        """kind: ccxt's class of the exchange ``name``. Raises SourceError for its settings."""
        self.name = name
        self._exchange_class, self._options = strict_class(kind), options
        try:
            _check_types(options.config_for(name), self._exchange_class({}), name)
            self._config = _build_config(options, name)
            self._prototype = self._exchange_class(self._config)
        except SourceError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever it makes of what it is told
            # Its text might repeat what is secret.
            raise SourceError(
                f"KRONOS_STREAM_CCXT__CONFIG: ccxt makes no {name} of it: {type(error).__name__}"
            ) from None
        self.cooldown = Cooldown(name)
        self._redactor = Redactor(options.config_for(name))
        self.rest = ExchangeClient(self._prototype, name, self.cooldown, self._redactor)
        """The one that is asked by REST."""

    @classmethod
    def for_venue(cls, venue: str, options: CcxtOptions) -> Self:
        """Of a venue's name. Raises SourceError where ccxt lacks it, or what is asked of it."""
        logging.getLogger("ccxt").setLevel(logging.WARNING)  # requests, with keys
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
        made = cls(name, next(getattr(one, name) for one in modules if hasattr(one, name)), options)
        if made.rest.has("fetchOHLCV") is not True:
            raise SourceError(f"KRONOS_STREAM_SYMBOLS: {name} has no history of candles in ccxt")
        if options.mode == "watch" and not made.watch_enabled:
            raise SourceError(
                f"KRONOS_STREAM_CCXT__MODE=watch: ccxt cannot watch candles of {name}; set auto"
            )
        return made

    @property
    def watch_enabled(self) -> bool:
        """Whether candles are to be watched, and not polled."""
        return self._options.mode != "poll" and self.rest.has("watchOHLCV") is True

    @property
    def fills_empty(self) -> bool:
        return self.name in self._options.fills_empty

    def create(self, hooks: Hooks) -> ExchangeClient:
        """One more. It knows the markets that are known now."""
        exchange = self._exchange_class(self._config)
        exchange.hooks = hooks
        exchange.throttler = self._prototype.throttler
        exchange.ssl_context = self._prototype.ssl_context
        # Pings so often that a silent exchange is a broken one. Whether it is, we judge by anything
        # that comes; ccxt would by pongs alone, which not every exchange sends.
        pings = round(self._options.stall_seconds * 1000 / 3)
        pings = min(exchange.streaming.get("keepAlive", pings), pings)
        exchange.streaming = {
            **exchange.streaming,
            "keepAlive": pings,
            "maxPingPongMisses": _UNLIMITED,
        }
        return ExchangeClient(exchange, self.name, self.cooldown, self._redactor)


class ExchangeClient:
    """One instance of ccxt's exchange. What it is asked raises SourceError and its kinds only."""

    def __init__(
        self,
        exchange: Any,  # noqa: ANN401 - no types
        name: str,
        cooldown: Cooldown,
        redactor: Redactor,
    ) -> None:
        self._exchange, self._name, self._cooldown = exchange, name, cooldown
        self._redactor = redactor

    def has(self, what: str) -> object:
        """True, or why it is not so: None, False, "emulated"."""
        return self._exchange.has.get(what)

    @property
    def timeframes(self) -> Collection[str]:
        return self._exchange.timeframes or {}

    @property
    def markets(self) -> Markets:
        """Those loaded last; none before."""
        return self._exchange.markets or {}

    async def load_markets(self) -> None:
        """Load the markets anew."""
        await self._call(self._exchange.load_markets, True)  # noqa: FBT003 - reload
        if not self.markets:
            raise SourceError(f"{self._name}: its list of markets is empty")

    def copy_markets(self, other: ExchangeClient) -> None:
        """Take over the markets that another instance has loaded."""
        if other.markets and self._exchange.markets is not other._exchange.markets:
            self._exchange.set_markets_from_exchange(other._exchange)

    async def server_time(self) -> int:
        """UTC ms by the exchange's clock."""
        said = await self._call(self._exchange.fetch_time)
        if type(said) is not int:
            raise SourceError(f"{self._name}: its time is none")
        return said

    def page_size(self, symbol: str) -> int:
        """How many rows may be asked for at a time."""
        try:
            most = self._exchange.feature_value(symbol, "fetchOHLCV", "limit", _DEFAULT_PAGE_SIZE)
        except Exception as error:  # noqa: BLE001 - ccxt's own, or what its tables lead to
            raise translate_error(error, self._name, self._redactor.redact) from None
        return most if type(most) is int and most > 1 else _DEFAULT_PAGE_SIZE

    async def fetch_ohlcv(self, series: Series, since: int, limit: int) -> Sequence[object]:
        """Candles from ``since``, UTC ms, on; more or fewer, as the exchange likes."""
        fetch = self._exchange.fetch_ohlcv
        rows: Sequence[object] = await self._call(
            fetch, series.symbol, str(series.timeframe), since, limit
        )
        return rows

    async def watch_ohlcv(self, series: Series) -> Sequence[object]:
        """The newest candles, once something is pushed."""
        watching = self._exchange.watch_ohlcv(series.symbol, str(series.timeframe))
        try:
            return list(await watching)
        except Exception as error:  # noqa: BLE001 - likewise
            raise self._translate_error(error) from None

    async def close(self) -> None:
        """Let go of all sockets, within bounds."""
        for close in (self._exchange.close_ws_clients, self._exchange.close):
            # A socket that does not answer must not keep the session open.
            with suppress(Exception):
                async with asyncio.timeout(_CLOSE_SECONDS):
                    await close()
            self._exchange.clients = {}

    async def _call(self, ask: Callable[..., Awaitable[_T]], *what: object) -> _T:
        self._cooldown.check(asyncio.get_running_loop().time())
        try:
            return await ask(*what)
        except Exception as error:  # noqa: BLE001 - ccxt falls over its own feet on odd answers
            raise self._translate_error(error) from None

    def _translate_error(self, error: Exception) -> SourceError:
        found = translate_error(error, self._name, self._redactor.redact)
        self._cooldown.record(found, asyncio.get_running_loop().time())
        return found


@cache
def exchange_names() -> frozenset[str]:
    """The exchanges that ccxt knows."""
    return frozenset(import_module("ccxt").exchanges)


def _build_config(options: CcxtOptions, name: str) -> dict[str, Any]:
    """What the constructor of ``name`` is told; ours goes before the user's."""
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
    """Refuse what ccxt would take as it is and fail over later. Raises SourceError."""
    for key, value in config.items():
        default = "" if _STRING_SETTINGS.search(key) else getattr(exchange, key, None)
        for kind, expected in _TYPE_NAMES.items():
            if isinstance(default, kind) and not isinstance(value, kind):
                raise SourceError(f"KRONOS_STREAM_CCXT__CONFIG: {name}.{key}: expected {expected}")


def _unknown_exchange(name: str) -> str:
    near = get_close_matches(name, sorted(exchange_names()), 1, 0.6)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"ccxt knows no exchange {name!r}{hint}"
