"""Stand-ins of chaos runs that record calls: source, inference worker, sink, log handler."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Mapping, Sequence
from random import Random

from kronos_stream.bars.window import Window
from kronos_stream.daemon.inference.backend import BatchResult
from kronos_stream.interfaces.sink import Record, Refusal, SinkUnavailable
from kronos_stream.interfaces.source import Source, SourceCallbacks
from kronos_stream.market.candle import Candle
from kronos_stream.market.series import Series
from kronos_stream.testing.exchange import SimulatedExchange
from tests.support.chaos_scenario import ForecastCall, HistoryRequest, RunLog, Scenario
from tests.support.fake_worker import FakeWorker


class ErrorLogHandler(logging.Handler):
    """Collects errors that libraries log, such as aiohttp for a failed handler."""

    def __init__(self, errors: list[str]) -> None:
        super().__init__(logging.ERROR)
        self._errors = errors

    def emit(self, record: logging.LogRecord) -> None:
        self._errors.append(f"{record.name}: {self.format(record)}")


class RecordingSource:
    """A source whose requests for history are recorded."""

    def __init__(self, source: Source, run: int, exchange: SimulatedExchange, log: RunLog) -> None:
        self._source, self._run, self._exchange = source, run, exchange
        self._log = log
        self.venue, self.traits = source.venue, source.traits

    async def unsupported(self, series: Collection[Series]) -> Mapping[Series, str]:
        return await self._source.unsupported(series)

    def subscribe(self, series: Collection[Series]) -> None:
        self._source.subscribe(series)

    async def run(self, callbacks: SourceCallbacks) -> None:
        await self._source.run(callbacks)

    async def history(self, series: Series, start: int, end: int) -> Sequence[Candle]:
        request = HistoryRequest(self._run, self._exchange.clock.now(), series, start, end)
        try:
            candles = await self._source.history(series, start, end)
            request = request._replace(bars=len(candles))
            return candles
        finally:
            self._log.history_requests.append(request)

    async def close(self) -> None:
        await self._source.close()


class RecordingWorker(FakeWorker):
    """A fake worker that records its windows."""

    def __init__(
        self, run: int, exchange: SimulatedExchange, seconds_per_forecast: float, log: RunLog
    ) -> None:
        super().__init__(seconds_per_forecast)
        self._run, self._exchange, self._log = run, exchange, log

    async def forecast(self, windows: Sequence[Window], deadline: float) -> BatchResult:
        now = self._exchange.clock.now()
        self._log.forecasts += [ForecastCall(self._run, now, window) for window in windows]
        return await super().forecast(windows, deadline)


class RecordingSink:
    """A sink that records deliveries; it may become unavailable in the middle of one."""

    name = "recorder"

    def __init__(self, scenario: Scenario, log: RunLog) -> None:
        self._scenario, self._log = scenario, log
        self._random = Random(f"sink:{scenario.seed}:{len(log.runs)}")

    async def start(self) -> None:
        self._check()

    async def deliver(self, records: Sequence[Record]) -> Sequence[Refusal]:
        try:
            self._check()
        except SinkUnavailable:
            self._log.delivered += records[: self._random.randrange(len(records) + 1)]
            raise
        self._log.delivered += records
        return []

    async def close(self) -> None:
        await asyncio.sleep(0)

    def _check(self) -> None:
        now = asyncio.get_running_loop().time()
        if any(start <= now < end for start, end in self._scenario.outages):
            raise SinkUnavailable("unavailable by the scenario")
