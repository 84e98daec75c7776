"""Recorded websocket frames, decoded like live ones.

A capture is text, plain or gzipped: a first line ``wss://… <-> epoch`` that names the connection,
then one frame per line, ``epoch: frame``, with the time of arrival in seconds.
"""

from __future__ import annotations

import gzip
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, NoReturn, Self
from urllib.parse import urlsplit

from kronos_connectors.binance.frames import FrameError, Kline, decode
from kronos_connectors.replay.recordings import FileSpec, InvalidFrame, received_at
from kronos_stream.market.candle import Candle, Update
from kronos_stream.market.candle_files import CandleFileError
from kronos_stream.market.series import Series
from kronos_stream.market.timeframe import Timeframe

_HEAD = re.compile(rb"(wss?://\S+) <-> \d+(\.\d+)?\s*")
_LINE = re.compile(rb"(\d{9,10}(?:\.\d+)?): (.*)", re.DOTALL)
_GZIP = b"\x1f\x8b"

_VENUE = "binance"
_QUOTES = (
    *("USDT", "USDC", "FDUSD", "TUSD", "BUSD", "USDP", "USD1", "DAI"),
    *("BTC", "ETH", "BNB", "XRP", "TRX", "DOGE", "SOL", "DOT"),
    *("EUR", "TRY", "BRL", "JPY", "GBP", "AUD", "RUB", "UAH", "ZAR", "PLN", "RON", "ARS", "MXN"),
    *("CZK", "COP", "IDR", "NGN", "BIDR", "USD"),
)
"""Quote currencies of Binance, to split symbols such as ETHBTC: listings are not recorded."""


@dataclass(frozen=True, slots=True, eq=False)
class CaptureFile:
    """Klines of a capture, a :class:`~kronos_connectors.replay.recordings.RecordedFile`."""

    path: Path
    begin: int
    """UTC ms of the first frame."""
    end: int
    """UTC ms of the last frame."""
    closed_bars: dict[Series, list[Update]] = field(repr=False)
    """Closed bars of each series in order of arrival; may be empty."""

    @classmethod
    def read(cls, spec: FileSpec) -> Self:
        """Scan the whole file. Raises CandleFileError if it is not a capture of klines."""
        path = spec.path
        if spec.symbol:
            _raise_error(path, "its frames name the series; give the file alone")
        closed: dict[Series, list[Update]] = {}
        begin: int | None = None
        received = 0
        for received, event in _frames(path):
            begin = received if begin is None else begin
            if isinstance(event, Update):
                updates = closed.setdefault(event.series, [])
                if event.closed:
                    updates.append(event)
        if begin is None or not closed:
            _raise_error(path, "no klines of Binance in it")
        return cls(path, begin, received, closed)

    @property
    def series(self) -> frozenset[Series]:
        return frozenset(self.closed_bars)

    def start(self, bars: int) -> int:  # noqa: ARG002 - a capture has no earlier bars
        return self.begin - 1

    def count(self, start: int) -> int:
        return sum(
            len(updates) - bisect_right(updates, start, key=received_at)
            for updates in self.closed_bars.values()
        )

    def events(self, start: int) -> Iterator[Update | InvalidFrame]:
        frames = _frames(self.path)
        return (event for received, event in frames if event is not None and received > start)

    def history(self, series: Series, start: int, end: int, now: int) -> Sequence[Candle]:
        known = {
            update.candle.time: update.candle
            for update in self.closed_bars[series]
            if update.received <= now and start <= update.candle.time < end
        }
        return [known[time] for time in sorted(known)]


def is_capture(path: Path) -> bool:
    """Return whether the file begins like a capture."""
    try:
        with _open_lines(path) as lines:
            return _HEAD.fullmatch(lines.readline(100_000)) is not None
    except (OSError, EOFError):  # reported when it is read as a candle file
        return False


class _SeriesLookup(dict[tuple[str, str], Series]):
    """Series by Binance's symbol and interval, created when first looked up."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._is_futures = parts.path.startswith("/market") or str(parts.hostname).startswith(
            "fstream"
        )

    def __missing__(self, key: tuple[str, str]) -> Series:
        name, interval = key
        quote = next((quote for quote in _QUOTES if name.endswith(quote)), "")
        base = name.removesuffix(quote)
        if not (base and quote):
            raise KeyError(key)
        symbol = f"{base}/{quote}" + (f":{quote}" if self._is_futures else "")
        try:
            self[key] = Series.of(_VENUE, symbol, Timeframe.parse(interval))
        except ValueError:
            raise KeyError(key) from None
        return self[key]


def _frames(path: Path) -> Iterator[tuple[int, Update | InvalidFrame | None]]:
    """Yield each frame's time of arrival, UTC ms, and its content; None if it is no kline."""
    with _open_lines(path) as lines:
        try:
            head = _HEAD.fullmatch(lines.readline())
            if head is None:
                _raise_error(
                    path, "not a capture: no line such as 'wss://… <-> 1626992740.1' at its top"
                )
            markets = _SeriesLookup(head[1].decode(errors="replace"))
            received = 0
            for number, line in enumerate(lines, 2):
                match = _LINE.fullmatch(line.rstrip(b"\r\n"))
                if match is None:
                    _raise_error(path, f"line {number}: expected 'epoch seconds: frame'")
                # Frames of two sockets may be out of order, and clocks may be set back.
                received = max(received, round(float(match[1]) * 1000))
                yield received, _decode_frame(match[2], markets, received)
        except (EOFError, gzip.BadGzipFile) as error:
            _raise_error(path, f"not readable ({error})")


def _decode_frame(
    frame: bytes, markets: _SeriesLookup, received: int
) -> Update | InvalidFrame | None:
    try:
        event = decode(frame, markets)
    except FrameError as error:
        return InvalidFrame(error.series, str(error), frame, received)
    if isinstance(event, Kline):
        return Update(event.series, event.candle, event.closed, received)
    return None


@contextmanager
def _open_lines(path: Path) -> Iterator[IO[bytes] | gzip.GzipFile]:
    with path.open("rb") as file:
        zipped = file.read(2) == _GZIP
        file.seek(0)
        if zipped:
            with gzip.open(file) as lines:
                yield lines
        else:
            yield file


def _raise_error(path: Path, reason: str) -> NoReturn:
    raise CandleFileError(f"{path}: {reason}") from None
