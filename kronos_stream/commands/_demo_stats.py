"""What the demo counts and shows."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import orjson
from rich.table import Table

from kronos_stream.daemon.requests import ForecastResult
from kronos_stream.interfaces.sink import Record, Refusal, Sink
from kronos_stream.market.clock import Clock
from kronos_stream.market.utc import parse_time, rfc3339

_MAX_ROWS = 24
"""Series that the table has room for."""

_MAX_LATENCIES = 200_000


class DemoStats:
    """Forecasts, what became of bars, and how long it took."""

    def __init__(self, series: Sequence[str], clock: Clock) -> None:
        self._clock = clock
        self._started = clock.now()
        self._series = list(series)
        self._latest: dict[str, ForecastResult] = {}
        self._outcomes: Counter[str] = Counter()
        self._delivered: Counter[str] = Counter()
        self._latencies: deque[float] = deque(maxlen=_MAX_LATENCIES)
        self._first_delivery_seconds: float | None = None
        self.first_delivered = asyncio.Event()
        """Set with the first delivered forecast."""

    def record_results(self, results: Sequence[ForecastResult]) -> None:
        """Results that are durable."""
        for result in results:
            self._outcomes[result.reason or "forecast"] += 1
            if result.outlook is not None:
                self._latest[result.request.series.name] = result

    def record_delivery(self, record: Record) -> None:
        """A record that the sink has acknowledged just now."""
        if record.kind != "forecast":
            return
        now = self._clock.now()
        if self._first_delivery_seconds is None:
            self._first_delivery_seconds = (now - self._started) / 1000
            self.first_delivered.set()
        self._delivered[record.key] += 1
        self._latencies.append(now - _received_time(record.value))

    def to_dict(self) -> dict[str, Any]:
        """The figures, for machines; times in ms, from a bar's last word to the acknowledgement."""
        delays = np.array(self._latencies) if self._latencies else np.array([np.nan])
        return {
            "series": len(self._series),
            "first_forecast_seconds": self._first_delivery_seconds,
            "forecasts": sum(self._delivered.values()),
            "by_series": dict(sorted(self._delivered.items())),
            "outcomes": dict(self._outcomes),
            "received_to_published_ms": {
                f"p{q}": round(float(np.percentile(delays, q)), 1) for q in (50, 95, 99)
            },
        }

    def summary_line(self) -> str:
        """Where things stand, in a line."""
        figures = self.to_dict()
        if self._first_delivery_seconds is None:
            return "waiting for the first bars to close …"
        skipped = sum(self._outcomes.values()) - self._outcomes["forecast"]
        delays = figures["received_to_published_ms"]
        return (
            f"{figures['forecasts']} forecasts of {len(self._delivered)} series, "
            f"{skipped} bars skipped; from a bar's last word to Kafka "
            f"{delays['p50']:.0f} ms (p50), {delays['p99']:.0f} ms (p99)"
        )

    def report(self) -> str:
        """The end."""
        if self._first_delivery_seconds is None:
            return "No forecast was made."
        skipped = {k: v for k, v in sorted(self._outcomes.items()) if k != "forecast"}
        why = ", ".join(f"{number} {reason}" for reason, number in skipped.items())
        return (
            f"First forecast after {self._first_delivery_seconds:.1f} s. {self.summary_line()}."
            + (f"\nSkipped: {why}." if why else "")
        )

    def table(self) -> Table:
        """The latest forecast of each series."""
        table = Table(title=self.summary_line(), title_justify="left", title_style="")
        for name in ("series", "origin", "last"):
            table.add_column(name, justify="left" if name == "series" else "right", no_wrap=True)
        for name in ("q05", "q50", "q95", "P(up)", "volatility"):
            table.add_column(name, justify="right")
        for name in self._series[:_MAX_ROWS]:
            result = self._latest.get(name)
            if result is None or result.outlook is None or result.window is None:
                table.add_row(name)
                continue
            made, last = result.outlook, result.window.last
            closes = [f"{made.channels['close'][q][-1]:.6g}" for q in ("q05", "q50", "q95")]
            volatility = made.summary.volatility
            table.add_row(
                name,
                rfc3339(last.time)[11:-1],
                f"{last.close:.6g}",
                *closes,
                f"{made.summary.p_up:.2f}",
                "" if volatility is None else f"{volatility:.2%}",
            )
        if len(self._series) > _MAX_ROWS:
            table.caption = f"and {len(self._series) - _MAX_ROWS} more"
        return table


class TimedSink:
    """A sink that tells the figures what it has delivered."""

    def __init__(self, sink: Sink, figures: DemoStats) -> None:
        self.name = sink.name
        self._sink, self._stats = sink, figures

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


def _received_time(value: bytes) -> float:
    """When the origin bar's last word came, UTC ms, from the message itself."""
    message = orjson.loads(value)
    opens = [parse_time(message["origin"]), parse_time(message["times"][0])]
    return float(opens[1] + message["latency_ms"]["close_to_received"])
