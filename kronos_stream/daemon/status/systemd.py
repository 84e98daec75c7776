"""Tells the service manager how the daemon stands: ready, at work, reloading, stopping, stuck.

Ready means that the settings are good and tasks are supervised. Whether candles come and forecasts
go out is /readyz's to say, and is told in the status: no restart brings back a venue that is away.
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
from kronos_stream.redaction import redact

_log = structlog.get_logger()

_STATUS_SECONDS = 5.0
_RATE_SECONDS = 60.0
_MAX_STATUS_LENGTH = 400
_CLOSE_SECONDS = 30.0
"""Beyond the grace, for sinks, sources, worker and state file to be let go."""


class MonitoredDaemon(Protocol):
    """What of a daemon is told."""

    settings: Settings
    metrics: Metrics
    running: asyncio.Event
    ready: asyncio.Event
    watchdog: Watchdog

    @property
    def series_count(self) -> int: ...

    def readiness(self) -> Mapping[str, str]: ...


class StatusReporter:
    """One daemon's reports, from its start to its end. Without a listener, it does nothing."""

    def __init__(self, daemon: MonitoredDaemon, notifier: Notifier) -> None:
        self._daemon, self._notifier = daemon, notifier
        self._reloads = 0
        self._stopping = False
        self._stalled = ""
        self._status = ""
        self._rate: int | None = None

    async def run(self) -> None:
        """Report until cancelled. Where that fails, the watchdog hears nothing more of us."""
        if self._notifier.enabled:
            try:
                await self._report()
            except* Exception:  # noqa: BLE001 - whatever it was
                _log.exception("no more reports to the service manager")

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
        """Before settings are read again; to be followed by :meth:`reloaded`."""
        self._reloads += 1
        if self._daemon.running.is_set() and not self._stopping:
            now = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
            self._notifier.notify(RELOADING=1, MONOTONIC_USEC=now)

    def reloaded(self) -> None:
        self._reloads -= 1
        if self._daemon.running.is_set() and not self._stopping and not self._reloads:
            self._notifier.notify(READY=1)

    def stopping(self, why: str = "") -> None:
        """Once it takes nothing in any more. why: what it failed of."""
        if not self._stopping:
            grace = self._daemon.settings.stop_grace
            self._stopping = True
            self._notifier.notify(
                STOPPING=1,
                STATUS="stopping: what is in hand is finished and delivered",
                EXTEND_TIMEOUT_USEC=round(1e6 * (grace + _CLOSE_SECONDS)),
            )
        if why:
            self._notifier.notify(STATUS=_status_line(f"failed: {why}"))

    async def _ping_watchdog(self, seconds: float) -> None:
        """Tell the watchdog that there is progress; once stopping, the stop has its own limit."""
        while True:
            self._check_stalled()
            if not self._stalled:
                self._notifier.notify(WATCHDOG=1)
            await asyncio.sleep(seconds)

    def _check_stalled(self) -> None:
        stuck = "" if self._stopping else self._daemon.watchdog.stalled()
        if stuck and not self._stalled:
            _log.error("stuck: the watchdog is not fed any more", what=stuck)
        self._stalled = stuck

    async def _report_status(self) -> None:
        while True:
            await asyncio.sleep(_STATUS_SECONDS)
            self._check_stalled()
            status = self._describe()
            if status != self._status and not self._stopping:
                self._status = status
                self._notifier.notify(STATUS=status)

    async def _measure_rate(self) -> None:
        """What was made, minute by minute."""
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
            yield f"stuck: {self._stalled}"
        amiss = {what: why for what, why in daemon.readiness().items() if why}
        if not daemon.ready.is_set():
            yield "starting"
            amiss.pop("start", None)
        elif amiss:
            yield "not ready"
        if daemon.ready.is_set():
            yield f"following {daemon.series_count} series"
        if self._rate is not None:
            what = "bars" if self._is_ingest else "forecasts"
            yield f"{self._rate} {what} in the last minute"
        if any(what.startswith("sink ") for what in amiss) and (waiting := self._undelivered()):
            yield f"{waiting} records undelivered"
        for what, why in amiss.items():
            yield f"{what}: {why}"

    @property
    def _is_ingest(self) -> bool:
        return self._daemon.settings.role == "ingest"

    def _produced(self) -> int:
        metrics = self._daemon.metrics
        return (
            _metric_total(metrics.bars)
            if self._is_ingest
            else _metric_total(metrics.outcomes, result="forecast")
        )

    def _undelivered(self) -> int:
        return _metric_total(self._daemon.metrics.queue_depth, queue="outbox:")


def _metric_total(metric: MetricWrapperBase, **begin: str) -> int:
    """The sum of its samples whose labels begin like that."""
    return round(
        sum(
            sample.value
            for family in metric.collect()
            for sample in family.samples
            if not sample.name.endswith("_created")
            and all(sample.labels.get(name, "").startswith(text) for name, text in begin.items())
        )
    )


def _status_line(text: str) -> str:
    """On a line that people read; they may see it who must not see passwords."""
    line = redact(" ".join(text.split()))
    return line if len(line) <= _MAX_STATUS_LENGTH else f"{line[: _MAX_STATUS_LENGTH - 1]}…"
