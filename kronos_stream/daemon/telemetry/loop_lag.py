"""Measurement of the event loop: its delay and the number of tasks."""

from __future__ import annotations

import asyncio

import structlog

from kronos_stream.daemon.telemetry.metrics import Metrics

_log = structlog.get_logger()

_LAG_INTERVAL_SECONDS = 0.25
_LAG_WARNING_SECONDS = 1.0


async def watch_loop_lag(metrics: Metrics) -> None:
    """Measure the event loop's delay and count its tasks, until cancelled."""
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + _LAG_INTERVAL_SECONDS
        await asyncio.sleep(_LAG_INTERVAL_SECONDS)
        lag = max(0.0, loop.time() - due)
        metrics.loop_lag.observe(lag)
        metrics.tasks.set(len(asyncio.all_tasks()))
        if lag > _LAG_WARNING_SECONDS:
            _log.warning("event loop was blocked", seconds=round(lag, 1))
