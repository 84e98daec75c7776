"""Strict decoder of Binance's WebSocket frames."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import orjson

from kronos_stream.market.candle import MAX_FLOAT32, MAX_TIME_MS, Candle
from kronos_stream.market.series import Series

_NUMBER = r"\d{1,40}(?:\.\d{1,40})?"
_NUMBERS = re.compile(rf"{_NUMBER}(?: {_NUMBER}){{5}}", re.ASCII)
"""Six decimals as Binance writes them; Python's float would also accept NaN, 1_000 and 1e999."""

Streams: TypeAlias = Mapping[tuple[str, str], Series]
"""Series by Binance's own symbol and interval, such as ("BTCUSDT", "5m")."""


class FrameError(ValueError):
    """Invalid frame: the reason, and the series if it is known."""

    def __init__(self, reason: str, series: Series | None = None) -> None:
        super().__init__(reason)
        self.series = series


class Kline(NamedTuple):
    """State of a bar, open or closed."""

    series: Series
    candle: Candle
    closed: bool


class Response(NamedTuple):
    """Response to a request."""

    id: int | None
    error: str
    """Empty if the request succeeded."""


class ServerShutdown(NamedTuple):
    """Announcement that the server will close the connection."""


class IgnoredFrame(NamedTuple):
    """Valid frame of another kind or series."""


def decode(
    frame: bytes | str, streams: Streams
) -> Kline | Response | ServerShutdown | IgnoredFrame:
    """Decode a frame. Raises FrameError if it is not an event, or an invalid kline."""
    try:
        message = orjson.loads(frame)
    except orjson.JSONDecodeError as error:
        raise FrameError(f"not JSON: {error.msg}") from None
    if type(message) is not dict:
        raise FrameError("not a JSON object")
    event = message.get("data")
    if event is None:
        event = message.get("event", message)
    if type(event) is list:  # of streams such as !ticker@arr
        return IgnoredFrame()
    if type(event) is not dict:
        raise FrameError("data is not a JSON object")
    kind = event.get("e")
    if kind == "kline":
        return _kline(event, streams)
    if kind == "serverShutdown":
        return ServerShutdown()
    if kind is None and message.keys() & {"result", "error", "code"}:
        return _response(message)
    return IgnoredFrame()


def _kline(event: dict[str, Any], streams: Streams) -> Kline | IgnoredFrame:
    kline = event.get("k")
    if type(kline) is not dict:
        raise FrameError("kline event without a kline")
    symbol, interval = kline.get("s"), kline.get("i")
    if type(symbol) is not str or type(interval) is not str:
        raise FrameError("kline without symbol and interval")
    try:
        series = streams[symbol, interval]
    except KeyError:
        return IgnoredFrame()
    if event.get("s") != symbol:
        raise FrameError(f"kline of {symbol} as an event of {_short_repr(event.get('s'))}", series)
    opened, closed, event_time = kline.get("t"), kline.get("x"), event.get("E")
    if type(opened) is not int or not 0 <= opened < MAX_TIME_MS:
        raise FrameError(f"invalid open time: {_short_repr(opened)}", series)
    ends = series.timeframe.after(opened) - 1
    if kline.get("T") != ends:
        raise FrameError(
            f"close time {_short_repr(kline.get('T'))} does not match open time {opened}", series
        )
    if type(closed) is not bool:
        raise FrameError(f"field x is not a boolean: {_short_repr(closed)}", series)
    if type(event_time) is not int or event_time < (ends if closed else opened):
        raise FrameError(
            f"invalid event time, or one before the bar's: {_short_repr(event_time)}", series
        )
    return Kline(series, _candle(opened, kline, series), closed)


def _candle(opened: int, kline: dict[str, Any], series: Series) -> Candle:
    numbers = [kline.get(name) for name in "ohlcvq"]
    candle = read_candle(opened, numbers)
    if candle is None:
        raise FrameError(f"invalid numbers: {', '.join(map(_short_repr, numbers))}", series)
    _, opening, high, low, close, volume, amount = candle
    if not (
        0 < low <= opening <= high <= MAX_FLOAT32
        and low <= close <= high
        and volume <= MAX_FLOAT32 >= (amount or 0.0)
    ):
        raise FrameError(candle.invalid_reason() or "impossible", series)
    return candle


def read_candle(opened: int, numbers: Sequence[Any]) -> Candle | None:
    """Candle of open, high, low, close, volume and quote volume; None if they are not decimals."""
    try:
        text = " ".join(numbers)
    except TypeError:
        return None
    if len(numbers) != 6 or _NUMBERS.fullmatch(text) is None:
        return None
    return Candle(opened, *map(float, numbers))


def _response(message: dict[str, Any]) -> Response:
    number = message.get("id")
    error = message.get("error")
    if error is None and "code" in message:
        error = message
    if type(error) is dict:
        error = error.get("msg", "an error without a message")
    text = error[:200] if type(error) is str else "" if error is None else _short_repr(error)
    return Response(number if type(number) is int else None, text)


def _short_repr(value: object) -> str:
    """Short text of a JSON value; nested values are not shown."""
    if value is None or type(value) in {str, int, float, bool}:
        return repr(value)[:40]
    return f"of type {type(value).__name__}"
