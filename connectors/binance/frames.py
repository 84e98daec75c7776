"""What Binance says over a websocket: bytes in, one value out. Strict, and never surprised."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import orjson

from kronos_stream.market.candle import Candle
from kronos_stream.market.series import Series

_DECIMAL = r"\d{1,40}(?:\.\d{1,40})?"
_DECIMALS = re.compile(f"{_DECIMAL}(?: {_DECIMAL}){{5}}", re.ASCII)
_LATEST = 253_402_300_800_000
"""The year 10,000."""

Streams = Mapping[tuple[str, str], Series]
"""Series by Binance's own symbol and interval, such as ("BTCUSDT", "5m")."""


class FrameError(ValueError):
    """A frame that cannot be: reason for people, and the series where it is known."""

    def __init__(self, reason: str, series: Series | None = None) -> None:
        super().__init__(reason)
        self.series = series


class Kline(NamedTuple):
    """A bar so far, or the last word on it."""

    series: Series
    candle: Candle
    closed: bool


class Answer(NamedTuple):
    """To a request of ours."""

    id: int | None
    error: str
    """Empty where it was carried out."""


class Shutdown(NamedTuple):
    """The server is about to go away."""


class Other(NamedTuple):
    """A frame that is none of our business."""


def decode(frame: bytes | str, streams: Streams) -> Kline | Answer | Shutdown | Other:
    """Read a frame. Raises FrameError for what is no JSON object, or a kline that cannot be."""
    try:
        message = orjson.loads(frame)
    except orjson.JSONDecodeError as error:
        raise FrameError(f"not JSON: {error}") from None
    if type(message) is not dict:
        raise FrameError("not a JSON object")
    event = message.get("data")
    if event is None:
        event = message.get("event", message)
    if type(event) is list:
        return Other()
    if type(event) is not dict:
        raise FrameError("its data is no object")
    kind = event.get("e")
    if kind == "kline":
        return _kline(event, streams)
    if kind == "serverShutdown":
        return Shutdown()
    if kind is None and ("result" in message or "error" in message or "id" in message):
        return _answer(message)
    return Other()


def _answer(message: dict[str, Any]) -> Answer:
    number = message.get("id")
    error = message.get("error")
    if error is None and "code" in message:
        error = message
    text = "" if error is None else str(error.get("msg", error) if type(error) is dict else error)
    return Answer(number if type(number) is int else None, text[:200])


def _kline(event: dict[str, Any], streams: Streams) -> Kline | Other:
    kline = event.get("k")
    if type(kline) is not dict:
        raise FrameError("a kline event without a kline")
    symbol, interval = kline.get("s"), kline.get("i")
    if type(symbol) is not str or type(interval) is not str or event.get("s") != symbol:
        raise FrameError("a kline without symbol and interval")
    series = streams.get((symbol, interval))
    if series is None:
        return Other()
    opened, ends, now = kline.get("t"), kline.get("T"), event.get("E")
    if type(opened) is not int or not 0 <= opened < _LATEST:
        raise FrameError(f"open time {opened!r}", series)
    if ends != series.timeframe.after(opened) - 1:
        raise FrameError(f"close time {ends!r} does not fit open time {opened}", series)
    closed = kline.get("x")
    if type(closed) is not bool:
        raise FrameError(f"whether it is closed: {closed!r}", series)
    if type(now) is not int or now < opened or (closed and now < ends):
        raise FrameError(f"event time {now!r} before what it tells of", series)
    numbers = [kline.get(name) for name in "ohlcvq"]
    candle = read_candle(opened, numbers)
    if candle is None:
        raise FrameError(f"numbers {numbers!r:.200}", series)
    if closed and (fault := candle.fault()) is not None:
        raise FrameError(fault, series)
    return Kline(series, candle, closed)


def read_candle(opened: int, numbers: list[Any]) -> Candle | None:
    """Of open, high, low, close, volume, quote volume as decimal strings; None if they are not."""
    try:
        text = " ".join(numbers)
    except TypeError:
        return None
    if len(numbers) != 6 or _DECIMALS.fullmatch(text) is None:
        return None
    o, h, l, c, v, q = map(float, numbers)  # noqa: E741
    return Candle(opened, o, h, l, c, v, q)
