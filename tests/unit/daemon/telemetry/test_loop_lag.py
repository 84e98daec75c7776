"""Measurement of the event loop's delay."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable

import pytest

from kronos_stream.daemon.telemetry.loop_lag import watch_loop_lag
from kronos_stream.daemon.telemetry.metrics import Metrics


async def test_blocked_event_loop_is_measured() -> None:
    metrics = Metrics()
    watch = asyncio.create_task(watch_loop_lag(metrics))
    await asyncio.sleep(0.05)
    time.sleep(0.5)  # noqa: ASYNC251 - blocks on purpose
    await asyncio.sleep(0.05)
    watch.cancel()
    assert _above(metrics, 0.1) >= 1


@pytest.mark.virtual_time
async def test_idle_event_loop_has_no_lag() -> None:
    metrics = Metrics()
    watch = asyncio.create_task(watch_loop_lag(metrics))
    await asyncio.sleep(60)
    watch.cancel()
    assert _above(metrics, 0.001) == 0
    assert _samples(metrics, "kronos_event_loop_lag_seconds_count") == [pytest.approx(240, abs=2)]


def _above(metrics: Metrics, seconds: float) -> float:
    (within,) = _samples(metrics, "kronos_event_loop_lag_seconds_bucket", le=str(seconds))
    (total,) = _samples(metrics, "kronos_event_loop_lag_seconds_count")
    return total - within


def _samples(metrics: Metrics, name: str, **labels: str) -> list[float]:
    families: Iterable[object] = metrics.registry.collect()
    return [
        s.value
        for family in families
        for s in family.samples  # type: ignore[attr-defined]
        if s.name == name and s.labels == labels
    ]
