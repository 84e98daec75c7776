"""Reports to systemd: ready, reloading, stopping, status text, watchdog pings.

READY means that the settings are valid and all tasks are supervised. Whether candles arrive and
forecasts are delivered is the subject of /readyz and of the status text: a restart would not help
if a venue cannot be reached.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping
from typing import Protocol

import structlog
from prometheus_client.metrics import MetricWrapperBase

from kronos_stream.daemon.config.settings import Settings
from kronos_stream.daemon.status.sd_notify import Notifier
from kronos_stream.daemon.status.watchdog import Watchdog
from kronos_stream.daemon.telemetry.metrics import Metrics
from kronos_stream.redaction import redact, shorten

_log = structlog.get_logger()

_STATUS_SECONDS = 5.0
_RATE_SECONDS = 60.0
_MAX_STATUS_LENGTH = 400
_CLOSE_SECONDS = 30.0
"""Time to close sinks, sources, worker and state file, after the stop's grace."""


class MonitoredDaemon(Protocol):
    """A daemon to report on."""

    settings: Settings
    metrics: Metrics
    running: asyncio.Event
    ready: asyncio.Event
    watchdog: Watchdog

    @property
    def series_count(self) -> int: ...

    def readiness(self) -> Mapping[str, str]: ...


class StatusReporter:
    """Reports on one daemon from its start to its end; does nothing without a service manager."""

    def __init__(self, daemon: MonitoredDaemon, notifier: Notifier) -> None:
        self._daemon, self._notifier = daemon, notifier
        self._reloads = 0
        self._stopping = False
        self._stalled = ""
        self._status = ""
        self._rate: int | None = None

    async def run(self) -> None:
        """Report until cancelled. After an error, systemd gets no more pings."""
        if self._notifier.enabled:
            try:
                await self._report()
            except* Exception:  # noqa: BLE001 - must not end the daemon
                _log.exception("reports to the service manager failed")

    async def _report(self) -> None:
        await self._daemon.running.wait()
        self._status = self._describe()
        self._notifier.notify(READY=1, STATUS=self._status)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._report_status())
            tasks.create_task(self._measure_rate())
            if self._notifier.watchdog_seconds:
                tasks.create_task(self._ping_watchdog(self._notifier.watchdog_seconds / 2))

    def reloading(self) -> None:
        """Report the start of a reload; :meth:`reloaded` must follow."""
        self._reloads += 1
        if self._daemon.running.is_set() and not self._stopping:
            now = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
            self._notifier.notify(RELOADING=1, MONOTONIC_USEC=now)

    def reloaded(self) -> None:
        """Report the end of a reload."""
        self._reloads -= 1
        if self._daemon.running.is_set() and not self._stopping and not self._reloads:
            self._notifier.notify(READY=1)

    def stopping(self, failure: str = "") -> None:
        """Report that the daemon stops. failure: the error that ends it, if any."""
        if not self._stopping:
            grace = self._daemon.settings.stop_grace
            self._stopping = True
            self._notifier.notify(
                STOPPING=1,
                STATUS="stopping: finishing the current batch and delivering messages",
                EXTEND_TIMEOUT_USEC=round(1e6 * (grace + _CLOSE_SECONDS)),
            )
        if failure:
            self._notifier.notify(STATUS=_status_line(f"failed: {failure}"))

    async def _ping_watchdog(self, interval: float) -> None:
        """Ping systemd's watchdog unless a task is stalled; during a stop, always."""
        while True:
            self._check_stalled()
            if not self._stalled:
                self._notifier.notify(WATCHDOG=1)
            await asyncio.sleep(interval)

    def _check_stalled(self) -> None:
        stalled = "" if self._stopping else self._daemon.watchdog.stalled()
        if stalled and not self._stalled:
            _log.error("stalled; no more pings to the watchdog", tasks=stalled)
        self._stalled = stalled

    async def _report_status(self) -> None:
        while True:
            await asyncio.sleep(_STATUS_SECONDS)
            self._check_stalled()
            status = self._describe()
            if status != self._status and not self._stopping:
                self._status = status
                self._notifier.notify(STATUS=status)

    async def _measure_rate(self) -> None:
        """Count forecasts, or bars in role ingest, per minute."""
        before = self._produced()
        while True:
            await asyncio.sleep(_RATE_SECONDS)
            now = self._produced()
            self._rate, before = now - before, now

    def _describe(self) -> str:
        return _status_line("; ".join(self._status_parts()))

    def _status_parts(self) -> Iterator[str]:
        daemon = self._daemon
        if self._stalled:
            yield f"stalled: {self._stalled}"
        problems = {name: problem for name, problem in daemon.readiness().items() if problem}
        if not daemon.ready.is_set():
            yield "starting"
            problems.pop("start", None)
        elif problems:
            yield "not ready"
        if daemon.ready.is_set():
            yield f"following {daemon.series_count} series"
        if self._rate is not None:
            unit = "bars" if self._is_ingest else "forecasts"
            yield f"{self._rate} {unit} in the last minute"
        if any(name.startswith("sink ") for name in problems) and (count := self._undelivered()):
            yield f"{count} records undelivered"
        for name, problem in problems.items():
            yield f"{name}: {problem}"

    @property
    def _is_ingest(self) -> bool:
        return self._daemon.settings.role == "ingest"

    def _produced(self) -> int:
        metrics = self._daemon.metrics
        if self._is_ingest:
            return _metric_total(metrics.bars)
        return _metric_total(metrics.outcomes, result="forecast")

    def _undelivered(self) -> int:
        return _metric_total(self._daemon.metrics.queue_depth, queue="outbox:")


def _metric_total(metric: MetricWrapperBase, **prefixes: str) -> int:
    """Sum the samples of a metric whose labels start with ``prefixes``."""
    return round(
        sum(
            sample.value
            for family in metric.collect()
            for sample in family.samples
            if not sample.name.endswith("_created")
            and all(sample.labels.get(name, "").startswith(text) for name, text in prefixes.items())
        )
    )


def _status_line(text: str) -> str:
    return shorten(redact(" ".join(text.split())), _MAX_STATUS_LENGTH)
