"""Times of pushes: open bars at intervals, closed ones shortly after their close."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from itertools import count

from kronos_stream.market.clock import Clock
from kronos_stream.testing.exchange.bar_faults import BarFaults
from kronos_stream.testing.exchange.bar_simulator import BarHistory, BarSimulator, Floats
from kronos_stream.testing.exchange.corruption import corrupt_push
from kronos_stream.testing.exchange.fault_injector import FaultInjector
from kronos_stream.testing.exchange.frames import AMOUNT, CLOSE, HIGH, TRADES, VOLUME
from kronos_stream.testing.exchange.ws_streams import Stream, Streams

_SECOND_MS = 1_000
_PUSH_MS = 2_000
_PHASE_MS = 400
"""Offset within a second at which open bars are pushed, apart from the closed ones."""
_LAG_MS = (3, 40)
"""Delay of closing pushes after the close of a bar."""
_REVISION_DELAY_MS = 2_000
_DUPLICATE_DELAY_MS = 300
_REORDER_MS = 100


class PushScheduler:
    """Advances bars and streams by the exchange's clock."""

    def __init__(
        self,
        bars: BarSimulator,
        bar_faults: BarFaults,
        streams: Streams,
        clock: Clock,
        fault_injector: FaultInjector,
    ) -> None:
        self._bars, self._bar_faults, self._streams = bars, bar_faults, streams
        self._clock, self._fault_injector = clock, fault_injector
        self._last_volumes: dict[str, tuple[int, Floats]] = {}
        self._scheduled: list[tuple[int, int, Callable[[int], None]]] = []
        self._sequence = count()
        fastest = next(iter(bars.histories.values())).timeframe.milliseconds
        self._period = _SECOND_MS if fastest == _SECOND_MS else _PUSH_MS

    async def run(self) -> None:
        """Run until cancelled."""
        now = self._clock.now()
        self._bars.advance(now)
        close = self._next_close()
        push = self._next_push(now)
        while True:
            due = min(close, push, self._scheduled[0][0] if self._scheduled else push)
            await self._clock.sleep_until(due)
            now = self._clock.now()
            self._bars.advance(now)
            if now >= close:
                self._push_closed(now)
                close = self._next_close()
            while self._scheduled and self._scheduled[0][0] <= now:
                heapq.heappop(self._scheduled)[2](now)
            if now >= push:
                self._push_open(now, odd=push // _SECOND_MS % 2 == 1)
                push = self._next_push(now)
            self._streams.flush()

    def _next_close(self) -> int:
        """Time of the next closing pushes: a random short delay after the close."""
        close = self._bars.opened + self._bars.base_ms
        return close + self._fault_injector.random_for("lag", close).randint(*_LAG_MS)

    def _next_push(self, now: int) -> int:
        return now - (now - _PHASE_MS) % self._period + self._period

    def _schedule(self, moment: int, action: Callable[[int], None]) -> None:
        heapq.heappush(self._scheduled, (moment, next(self._sequence), action))

    # -- open bars -------------------------------------------------------------------------

    def _push_open(self, now: int, *, odd: bool) -> None:
        """Push open bars: of one second every second, others every two; only if they trade."""
        for name, history in self._bars.histories.items():
            if odd and history.timeframe.milliseconds != _SECOND_MS:
                continue
            streams = self._streams.subscribed(name)
            if not streams:
                continue
            bars = self._bars.current_bars(history, now)
            opened, previous = self._last_volumes.get(name, (0, bars))
            volume = bars[:, VOLUME].copy()
            traded = volume != previous if opened == history.opened else volume > 0
            self._last_volumes[name] = history.opened, volume
            rows = bars.tolist()
            for stream in streams:
                if not traded[stream.index] or self._is_silent(stream, now):
                    continue
                if self._fault_injector.is_lost(
                    stream.symbol, name, history.opened, history.closes
                ):
                    continue
                self._push(stream, rows[stream.index], history.opened, final=False, event=now)

    # -- closed bars -----------------------------------------------------------------------

    def _push_closed(self, now: int) -> None:
        for history, opened in self._bar_faults.pop_closed():
            if opened < history.oldest:  # the machine was suspended for longer than the history
                continue
            rows = history.bars(opened).tolist()
            bar_faults = self._bar_faults.faults_at(history, opened)
            for stream in self._streams.subscribed(str(history.timeframe)):
                bar = rows[stream.index]
                if bar[CLOSE] != bar[CLOSE]:  # NaN: no bar
                    continue
                if stream.index in bar_faults:
                    self._push_faulty(stream, history, opened, now, bar_faults[stream.index])
                elif not self._is_silent(stream, now):
                    self._push(stream, bar, opened, final=True, event=now)

    def _push_faulty(
        self,
        stream: Stream,
        history: BarHistory,
        opened: int,
        now: int,
        bar_faults: dict[str, float],
    ) -> None:
        """Push a closed bar that has faults."""
        if "lost" in bar_faults or "missing_final" in bar_faults:
            return
        faults = self._fault_injector.faults
        size = bar_faults.get("garbage")
        if size is not None:
            self._push_corrupted(stream, history, opened, now)
            if size < 1.0:  # replaces the closing push, else comes before it
                return
        pushed_at = now
        if "late" in bar_faults:
            pushed_at = now + round(bar_faults["late"] * faults.late_seconds * 1000)
            self._schedule(pushed_at, lambda at: self._push_final(stream, history, opened, at))
        elif "disorder" in bar_faults:
            pushed_at = self._push_out_of_order(
                stream, history, opened, now, bar_faults["disorder"]
            )
        else:
            self._push_final(stream, history, opened, now)
        if "duplicate" in bar_faults:
            duplicate_at = pushed_at + round(bar_faults["duplicate"] * _DUPLICATE_DELAY_MS)
            self._schedule(
                duplicate_at, lambda _: self._push_final(stream, history, opened, pushed_at)
            )
        if "revised" in bar_faults:
            revised_at = pushed_at + round(bar_faults["revised"] * _REVISION_DELAY_MS)
            self._schedule(revised_at, lambda at: self._revise(stream, history, opened, at))

    def _push_out_of_order(
        self, stream: Stream, history: BarHistory, opened: int, now: int, size: float
    ) -> int:
        """Push the next bar before the closing push, or an open push after it."""
        if size < 1.0:
            period = _SECOND_MS if history.timeframe.milliseconds == _SECOND_MS else _PUSH_MS
            pushed_at = self._next_push(now) + period - _SECOND_MS + _REORDER_MS
            self._schedule(pushed_at, lambda _: self._push_final(stream, history, opened, now))
            return pushed_at
        self._push_final(stream, history, opened, now)
        stale = history.bars(opened)[stream.index].tolist()
        stale[CLOSE] = stale[0]
        self._schedule(
            now + _REORDER_MS,
            lambda _: self._push(stream, stale, opened, final=False, event=now - _SECOND_MS),
        )
        return now

    def _push_final(self, stream: Stream, history: BarHistory, opened: int, event: int) -> None:
        if opened >= history.oldest and not self._is_silent(stream, self._clock.now()):
            bar = history.bars(opened)[stream.index].tolist()
            self._push(stream, bar, opened, final=True, event=event)

    def _push_corrupted(self, stream: Stream, history: BarHistory, opened: int, now: int) -> None:
        if self._is_silent(stream, now):
            return
        kline = stream.writer.push(
            history.bars(opened)[stream.index].tolist(),
            opened, history.timeframe.after(opened), final=True, event=now,
        )  # fmt: skip
        random = self._fault_injector.random_for("garbage", stream.symbol, stream.interval, opened)
        self._streams.push(stream, corrupt_push(kline, random))

    def _revise(self, stream: Stream, history: BarHistory, opened: int, now: int) -> None:
        """Change a closed bar, unless no client would receive the change."""
        if self._is_silent(stream, now) or not any(c.is_receiving for c in stream.listeners):
            return
        if opened < history.oldest:
            return
        bar = history.bars(opened)[stream.index]
        self._bar_faults.record_version(history, opened, stream.index)
        instrument = self._bars.instruments[stream.index]
        price = bar[HIGH] + instrument.tick
        volume = bar[VOLUME] + instrument.lot
        bar[HIGH] = bar[CLOSE] = price
        bar[AMOUNT] += instrument.lot * price
        bar[VOLUME], bar[TRADES] = volume, bar[TRADES] + 1
        self._bars.round_bars(history.bars(opened))
        self._fault_injector.record("revised", f"{stream.symbol}:{stream.interval}", now)
        self._push(stream, bar.tolist(), opened, final=True, event=now)

    # -- both ------------------------------------------------------------------------------

    def _is_silent(self, stream: Stream, now: int) -> bool:
        return self._fault_injector.is_silent(stream.symbol, now)

    def _push(
        self, stream: Stream, bar: list[float], opened: int, *, final: bool, event: int
    ) -> None:
        closes = self._bars.histories[stream.interval].timeframe.after(opened)
        kline = stream.writer.push(bar, opened, closes, final=final, event=event)
        self._streams.push(stream, kline)
