"""What is pushed when: open bars every so often, closed ones shortly after their close."""

from __future__ import annotations

from random import Random

import numpy as np

from kronos_stream.market.clock import Clock
from kronos_stream.testing.exchange.bars import Bars, Book
from kronos_stream.testing.exchange.frames import VOLUME
from kronos_stream.testing.exchange.sockets import Streams

_SECOND_MS = 1_000
_PUSH_MS = 2_000
_PHASE_MS = 400
"""When within its period an open bar is pushed: not together with the closed ones."""
_SLOWEST_CLOSE_MS = 40


class Pushes:
    """Drives the bars and the streams by the exchange's clock."""

    def __init__(self, bars: Bars, streams: Streams, clock: Clock, seed: int) -> None:
        self._bars, self._streams, self._clock, self._seed = bars, streams, clock, seed
        self._closed: list[tuple[Book, int]] = []
        self._said: dict[str, tuple[int, np.ndarray]] = {}

    def closed(self, book: Book, opened: int) -> None:
        """A bar has closed; it is said at the next turn."""
        self._closed.append((book, opened))

    async def run(self) -> None:
        """Until cancelled."""
        base = self._bars.base_ms
        now = self._clock.now()
        close = now - now % base + base
        push = now - now % _SECOND_MS + _SECOND_MS + _PHASE_MS
        while True:
            # A trade at the close takes its time through the venue; a little more or less.
            lag = 3 + Random(f"{self._seed}:{close}").randrange(_SLOWEST_CLOSE_MS - 3)
            await self._clock.sleep_until(min(close + lag, push))
            now = self._clock.now()
            self._bars.advance(now)
            if now >= close + lag:
                self._say_closed(now)
                close = now - now % base + base
            if now >= push:
                self._say_open(now, push)
                push = now - now % _SECOND_MS + _SECOND_MS + _PHASE_MS
            self._streams.flush()

    def _say_closed(self, now: int) -> None:
        for book, opened in self._closed:
            bars = book.bars(opened).tolist()
            closes = book.timeframe.after(opened)
            for stream in self._streams.heard(str(book.timeframe)):
                bar = bars[stream.index]
                if bar[0] == bar[0]:
                    kline = stream.writer.push(bar, opened, closes, final=True, event=now)
                    self._streams.push(stream, kline)
        self._closed.clear()

    def _say_open(self, now: int, moment: int) -> None:
        for name, book in self._bars.books.items():
            step = book.timeframe.milliseconds
            if step != _SECOND_MS and moment // _SECOND_MS % 2:
                continue
            streams = self._streams.heard(name)
            if not streams:
                continue
            bars = self._bars.unfinished(book, now)
            opened, said = self._said.get(name, (0, None))
            volume = bars[:, VOLUME].copy()
            traded = volume > 0 if said is None or opened != book.opened else volume != said
            self._said[name] = book.opened, volume
            rows = bars.tolist()
            for stream in streams:
                if traded[stream.index]:
                    kline = stream.writer.push(
                        rows[stream.index], book.opened, book.closes, final=False, event=now
                    )
                    self._streams.push(stream, kline)
