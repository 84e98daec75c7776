"""Recorded websocket frames, decoded as live ones are.

A capture is text, plain or gzipped: a first line ``wss://… <-> epoch`` that names the connection,
then one frame per line, ``epoch: frame``, with the time in seconds at which it was received.
"""

from __future__ import annotations

import gzip
import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import IO, NoReturn, Self
from urllib.parse import urlsplit

from kronos_connectors.binance.frames import FrameError, Kline, decode
from kronos_connectors.replay.recordings import FileSpec, InvalidFrame
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
"""What Binance quotes prices in: a frame says ETHBTC, the listing is not recorded with it."""

_received = attrgetter("received")


@dataclass(frozen=True, slots=True, eq=False)
class CaptureFile:
    """The klines in a capture, a :class:`~kronos_connectors.replay.recordings.Track`."""

    path: Path
    begin: int
    """UTC ms of the first frame."""
    end: int
    """And of the last one."""
    closed_bars: dict[Series, list[Update]] = field(repr=False)
    """The venue's last words, by series, in the order of arrival; empty where there is none."""

    @classmethod
    def read(cls, spec: FileSpec) -> Self:
        """Look through the whole file. Raises CandleFileError where it is no capture of klines."""
        path = spec.path
        if spec.symbol:
            _raise_error(path, "its frames name the series; give the file alone")
        closed: dict[Series, list[Update]] = {}
        begin: int | None = None
        received = 0
        for received, told in _frames(path):
            begin = received if begin is None else begin
            if isinstance(told, Update):
                words = closed.setdefault(told.series, [])
                if told.closed:
                    words.append(told)
        if begin is None or not closed:
            _raise_error(path, "no klines of Binance in it")
        return cls(path, begin, received, closed)

    @property
    def series(self) -> frozenset[Series]:
        return frozenset(self.closed_bars)

    def start(self, bars: int) -> int:  # noqa: ARG002 - it begins when it begins
        return self.begin - 1

    def count(self, start: int) -> int:
        return sum(
            len(words) - bisect_right(words, start, key=_received)
            for words in self.closed_bars.values()
        )

    def events(self, start: int) -> Iterator[Update | InvalidFrame]:
        frames = _frames(self.path)
        return (told for received, told in frames if told is not None and received > start)

    def history(self, series: Series, start: int, end: int, now: int) -> Sequence[Candle]:
        known = {
            told.candle.time: told.candle
            for told in self.closed_bars[series]
            if told.received <= now and start <= told.candle.time < end
        }
        return [known[time] for time in sorted(known)]


def is_capture(path: Path) -> bool:
    """Whether the file begins as a capture does."""
    try:
        with _open_lines(path) as lines:
            return _HEAD.fullmatch(lines.readline(100_000)) is not None
    except (OSError, EOFError):  # whoever reads it as something else will say so
        return False


class _SeriesLookup(Mapping[tuple[str, str], Series]):
    """Series by Binance's symbol and interval, whatever symbol is asked for."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._futures = parts.path.startswith("/market") or str(parts.hostname).startswith(
            "fstream"
        )
        self._known: dict[tuple[str, str], Series | None] = {}

    def __getitem__(self, key: tuple[str, str]) -> Series:
        if key not in self._known:
            self._known[key] = self._series(*key)
        series = self._known[key]
        if series is None:
            raise KeyError(key)
        return series

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return (key for key, series in self._known.items() if series is not None)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _series(self, name: str, interval: str) -> Series | None:
        quote = next((quote for quote in _QUOTES if name.endswith(quote)), "")
        base = name.removesuffix(quote)
        symbol = f"{base}/{quote}" + (f":{quote}" if self._futures else "")
        try:
            return Series.of(_VENUE, symbol, Timeframe.parse(interval)) if base and quote else None
        except ValueError:
            return None


def _frames(path: Path) -> Iterator[tuple[int, Update | InvalidFrame | None]]:
    """Each frame's arrival, UTC ms, and what it tells; None where that is nothing of ours."""
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
                # Recorders write down two sockets out of order, and clocks are set back.
                received = max(received, round(float(match[1]) * 1000))
                yield received, _decode_frame(match[2], markets, received)
        except (EOFError, gzip.BadGzipFile) as error:
            _raise_error(path, f"not readable ({error})")


def _decode_frame(
    frame: bytes, markets: _SeriesLookup, received: int
) -> Update | InvalidFrame | None:
    try:
        told = decode(frame, markets)
    except FrameError as error:
        return InvalidFrame(error.series, str(error), frame, received)
    if isinstance(told, Kline):
        return Update(told.series, told.candle, told.closed, received)
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
