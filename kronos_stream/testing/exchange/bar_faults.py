"""Faults of closed bars: hidden, lost and revised ones."""

from __future__ import annotations

from math import inf

from kronos_stream.market.candle import Bar, Candle
from kronos_stream.testing.exchange.bar_simulator import END_OF_TIME, BarHistory, BarSimulator
from kronos_stream.testing.exchange.fault_injector import FaultInjector

_PRUNE_INTERVAL = 1_000


class BarFaults:
    """Faults of each closed bar, and its earlier versions."""

    def __init__(self, bars: BarSimulator, fault_injector: FaultInjector) -> None:
        self._bars, self._fault_injector = bars, fault_injector
        self._symbols = [instrument.symbol for instrument in bars.instruments]
        self._closed: list[tuple[BarHistory, int]] = []
        self._faults: dict[tuple[str, int], dict[int, dict[str, float]]] = {}
        self._versions: dict[tuple[str, int, int], list[Candle]] = {}
        self._prune_countdown = _PRUNE_INTERVAL
        bars.on_close = self._record_close

    def _record_close(self, history: BarHistory, opened: int) -> None:
        """Draw the faults of a bar that has just closed, for every instrument."""
        self._closed.append((history, opened))
        if not self._fault_injector.faults.affect_bars:
            return
        interval, closes = str(history.timeframe), history.timeframe.after(opened)
        drawn = {}
        for index, symbol in enumerate(self._symbols):
            kinds = self._fault_injector.bar_faults(symbol, interval, opened, closes)
            if kinds:
                drawn[index] = kinds
                for kind in kinds:
                    if kind != "revised":  # a revision may still be dropped
                        self._fault_injector.record(kind, f"{symbol}:{interval}", closes)
        if drawn:
            self._faults[interval, opened] = drawn
        self._prune_countdown -= 1
        if not self._prune_countdown:
            self._prune()

    def pop_closed(self) -> list[tuple[BarHistory, int]]:
        """The bars closed since the last call."""
        closed, self._closed = self._closed, []
        return closed

    def faults_at(self, history: BarHistory, opened: int) -> dict[int, dict[str, float]]:
        """Faults of the bars that opened at ``opened``, by instrument."""
        return self._faults.get((str(history.timeframe), opened), {})

    def is_visible(self, history: BarHistory, opened: int, index: int, now: int) -> bool:
        """Return whether REST has the closed bar at ``now``."""
        drawn = self.faults_at(history, opened).get(index, {})
        hidden = inf if "lost" in drawn else drawn.get("hidden", 0.0)
        seconds = hidden * self._fault_injector.faults.hidden_seconds
        return now >= history.timeframe.after(opened) + seconds * 1000

    def record_version(self, history: BarHistory, opened: int, index: int) -> None:
        """Store the current version of a bar, before it changes."""
        candle = Candle(opened, *history.bars(opened)[index, :6].tolist())
        self._versions.setdefault((str(history.timeframe), index, opened), []).append(candle)

    def versions(self, history: BarHistory, opened: int, index: int) -> list[Candle]:
        """Earlier versions of a changed bar, oldest first."""
        return self._versions.get((str(history.timeframe), index, opened), [])

    def truth(self, history: BarHistory, index: int, since: int) -> list[Bar]:
        """Closed bars of a series that opened at ``since`` or later, as a sequencer confirms them.

        Bars that the venue does not have are synthetic: flat at the previous close, or left out if
        there is none.
        """
        opens, rows = history.between(min(since, history.oldest), END_OF_TIME)
        bars: list[Bar] = []
        for opened, row in zip(opens, rows[:, index, :6].tolist(), strict=True):
            lost = "lost" in self.faults_at(history, opened).get(index, {})
            if not lost and row[0] == row[0]:
                revision = len(self.versions(history, opened, index))
                bars.append(Bar(Candle(opened, *row), revision))
            elif bars:
                flat = bars[-1].candle.close
                candle = Candle(opened, flat, flat, flat, flat, 0.0, 0.0)
                bars.append(Bar(candle, synthetic=True))
        return [bar for bar in bars if bar.candle.time >= since]

    def _prune(self) -> None:
        """Drop faults of bars that the histories no longer keep."""
        self._prune_countdown = _PRUNE_INTERVAL
        oldest = {interval: history.oldest for interval, history in self._bars.histories.items()}
        self._faults = {k: v for k, v in self._faults.items() if k[1] >= oldest[k[0]]}
        self._versions = {k: v for k, v in self._versions.items() if k[2] >= oldest[k[0]]}
