"""What became of closed bars: hidden or lost ones, and those that the venue has changed."""

from __future__ import annotations

from math import inf

from kronos_stream.market.candle import Bar, Candle
from kronos_stream.testing.exchange.bars import Bars, Book
from kronos_stream.testing.exchange.fate import Fate

_SWEEP_EVERY = 1_000


class Ledger:
    """Faults per closed bar, and the versions it has had."""

    def __init__(self, bars: Bars, fate: Fate) -> None:
        self._bars, self._fate = bars, fate
        self._symbols = [instrument.symbol for instrument in bars.instruments]
        self._closed: list[tuple[Book, int]] = []
        self._strikes: dict[tuple[str, int], dict[int, dict[str, float]]] = {}
        self._versions: dict[tuple[str, int, int], list[Candle]] = {}
        self._sweep_in = _SWEEP_EVERY
        bars.closed = self._close

    def _close(self, book: Book, opened: int) -> None:
        """A bar of every instrument has closed: draw what befalls it."""
        self._closed.append((book, opened))
        if not self._fate.faults.befall_bars:
            return
        interval, closes = str(book.timeframe), book.timeframe.after(opened)
        struck = {}
        for index, symbol in enumerate(self._symbols):
            strikes = self._fate.of_bar(symbol, interval, opened, closes)
            if strikes:
                struck[index] = strikes
                for kind in strikes:
                    if kind != "revised":  # it may come to nothing
                        self._fate.struck(kind, f"{symbol}:{interval}", closes)
        if struck:
            self._strikes[interval, opened] = struck
        self._sweep_in -= 1
        if not self._sweep_in:
            self._sweep()

    def take_closed(self) -> list[tuple[Book, int]]:
        """The bars closed since the last call."""
        closed, self._closed = self._closed, []
        return closed

    def strikes(self, book: Book, opened: int) -> dict[int, dict[str, float]]:
        """The faults that befell the bars opened at ``opened``, by instrument."""
        return self._strikes.get((str(book.timeframe), opened), {})

    def shows(self, book: Book, opened: int, index: int, now: int) -> bool:
        """Whether REST has the closed bar at ``now``."""
        strikes = self.strikes(book, opened).get(index, {})
        hidden = inf if "lost" in strikes else strikes.get("hidden", 0.0)
        seconds = hidden * self._fate.faults.hidden_seconds
        return now >= book.timeframe.after(opened) + seconds * 1000

    def keep_version(self, book: Book, opened: int, index: int) -> None:
        """Remember a bar as it is now, before it is changed."""
        candle = Candle(opened, *book.bars(opened)[index, :6].tolist())
        self._versions.setdefault((str(book.timeframe), index, opened), []).append(candle)

    def versions(self, book: Book, opened: int, index: int) -> list[Candle]:
        """What a changed bar has been before, oldest first."""
        return self._versions.get((str(book.timeframe), index, opened), [])

    def truth(self, book: Book, index: int, since: int) -> list[Bar]:
        """The closed bars of one series that opened at ``since`` or later, as a tape holds them.

        What the venue does not have is flat at the close before it, synthetic; such bars are left
        out where nothing is known before them.
        """
        opens, rows = book.between(min(since, book.oldest), 2**62)
        bars: list[Bar] = []
        for opened, row in zip(opens, rows[:, index, :6].tolist(), strict=True):
            lost = "lost" in self.strikes(book, opened).get(index, {})
            if not lost and row[0] == row[0]:
                revision = len(self.versions(book, opened, index))
                bars.append(Bar(Candle(opened, *row), revision))
            elif bars:
                flat = bars[-1].candle.close
                candle = Candle(opened, flat, flat, flat, flat, 0.0, 0.0)
                bars.append(Bar(candle, synthetic=True))
        return [bar for bar in bars if bar.candle.time >= since]

    def _sweep(self) -> None:
        """Forget what the books have forgotten."""
        self._sweep_in = _SWEEP_EVERY
        oldest = {interval: book.oldest for interval, book in self._bars.books.items()}
        self._strikes = {k: v for k, v in self._strikes.items() if k[1] >= oldest[k[0]]}
        self._versions = {k: v for k, v in self._versions.items() if k[2] >= oldest[k[0]]}
