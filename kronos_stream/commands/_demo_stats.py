"""Figures of the demo: forecasts, outcomes and latencies."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import orjson
from rich.table import Table

from kronos_stream.commands._outcomes import OutcomeCounts, format_skipped
from kronos_stream.daemon.requests import ForecastResult
from kronos_stream.interfaces.sink import Record, Refusal, Sink
from kronos_stream.market.clock import Clock
from kronos_stream.market.utc import parse_time, rfc3339

_MAX_ROWS = 24
"""Series shown in the table."""

_MAX_LATENCIES = 200_000


class DemoStats:
    """Forecasts by series, outcomes of bars, and latencies."""

    def __init__(self, series: Sequence[str], clock: Clock) -> None:
        self._clock = clock
        self._started = clock.now()
        self._series = list(series)
        self._latest: dict[str, ForecastResult] = {}
        self._outcomes = OutcomeCounts()
        self._delivered: Counter[str] = Counter()
        self._latencies: deque[float] = deque(maxlen=_MAX_LATENCIES)
        self._first_delivery_seconds: float | None = None
        self.first_delivered = asyncio.Event()
        """Set when the first forecast is delivered."""

    def record_results(self, results: Sequence[ForecastResult]) -> None:
        """Count results that are durable."""
        self._outcomes.add(results)
        self._latest |= {
            result.request.series.name: result for result in results if result.outlook is not None
        }

    def record_delivery(self, record: Record) -> None:
        """Count a record that the sink has just acknowledged."""
        if record.kind != "forecast":
            return
        now = self._clock.now()
        if self._first_delivery_seconds is None:
            self._first_delivery_seconds = (now - self._started) / 1000
            self.first_delivered.set()
        self._delivered[record.key] += 1
        self._latencies.append(now - _received_time(record.value))

    def to_dict(self) -> dict[str, Any]:
        """Figures for JSON; times in ms, from receiving a closed bar to the acknowledgement."""
        delays = np.array(self._latencies) if self._latencies else np.array([np.nan])
        return {
            "series": len(self._series),
            "first_forecast_seconds": self._first_delivery_seconds,
            "forecasts": sum(self._delivered.values()),
            "by_series": dict(sorted(self._delivered.items())),
            "outcomes": self._outcomes.to_dict(),
            "received_to_published_ms": {
                f"p{q}": round(float(np.percentile(delays, q)), 1) for q in (50, 95, 99)
            },
        }

    def summary_line(self) -> str:
        """The figures so far in one line."""
        if self._first_delivery_seconds is None:
            return "waiting for the first bars to close …"
        figures = self.to_dict()
        delays = figures["received_to_published_ms"]
        return (
            f"{figures['forecasts']} forecasts of {len(self._delivered)} series, "
            f"{self._outcomes.bars - self._outcomes.forecasts} bars skipped; from receiving a "
            f"closed bar to Kafka {delays['p50']:.0f} ms (p50), {delays['p99']:.0f} ms (p99)"
        )

    def report(self) -> str:
        """The figures at the end of the demo."""
        if self._first_delivery_seconds is None:
            return "No forecast was made."
        skipped = format_skipped(self._outcomes.skipped())
        return (
            f"First forecast after {self._first_delivery_seconds:.1f} s. {self.summary_line()}."
            + (f"\nSkipped: {skipped}." if skipped else "")
        )

    def table(self) -> Table:
        """The latest forecast of each series."""
        table = Table(title=self.summary_line(), title_justify="left", title_style="")
        for name in ("series", "origin", "last", "q05", "q50", "q95", "P(up)", "volatility"):
            narrow = name in {"series", "origin", "last"}
            table.add_column(name, justify="left" if name == "series" else "right", no_wrap=narrow)
        for name in self._series[:_MAX_ROWS]:
            result = self._latest.get(name)
            if result is None or result.outlook is None or result.window is None:
                table.add_row(name)
                continue
            outlook, last = result.outlook, result.window.last
            closes = [f"{outlook.channels['close'][q][-1]:.6g}" for q in ("q05", "q50", "q95")]
            volatility = outlook.summary.volatility
            table.add_row(
                name,
                rfc3339(last.time)[11:-1],
                f"{last.close:.6g}",
                *closes,
                f"{outlook.summary.p_up:.2f}",
                "" if volatility is None else f"{volatility:.2%}",
            )
        if len(self._series) > _MAX_ROWS:
            table.caption = f"and {len(self._series) - _MAX_ROWS} more"
        return table


class TimedSink:
    """A sink that records its deliveries in the stats."""

    def __init__(self, sink: Sink, stats: DemoStats) -> None:
        self.name = sink.name
        self._sink, self._stats = sink, stats

    async def start(self) -> None:
        await self._sink.start()

    async def deliver(self, records: Sequence[Record]) -> Sequence[Refusal]:
        refusals = await self._sink.deliver(records)
        refused = {refusal.record.sequence for refusal in refusals}
        for record in records:
            if record.sequence not in refused:
                self._stats.record_delivery(record)
        return refusals

    async def close(self) -> None:
        await self._sink.close()


def _received_time(message: bytes) -> float:
    """Time at which the origin bar was received as closed, UTC ms, read from the message."""
    value = orjson.loads(message)
    close = parse_time(value["times"][0])  # the origin bar closes when the next one opens
    return float(close + value["latency_ms"]["close_to_received"])
