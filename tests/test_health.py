"""The daemon's HTTP endpoints, with a real client."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from kronos_stream.daemon.health import Health, watch_loop_lag
from kronos_stream.daemon.metrics import Metrics
from kronos_stream.daemon.settings import SettingsError
from kronos_stream.testing.virtual import run_virtual


async def _get(port: int, path: str) -> tuple[int, str, str]:
    url = f"http://127.0.0.1:{port}{path}"
    async with aiohttp.ClientSession() as session, session.get(url) as answer:
        return answer.status, answer.content_type, await answer.text()


async def test_metrics_are_what_prometheus_reads() -> None:
    metrics = Metrics()
    metrics.gaps.labels("binance").inc(3)
    async with Health("127.0.0.1", 0, metrics, dict) as health:
        status, kind, text = await _get(health.port, "/metrics")
    assert (status, kind) == (200, "text/plain")
    samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
    assert ("kronos_gaps_total", {"venue": "binance"}, 3.0) in [s[:3] for s in samples]


async def test_ready_is_when_every_check_is_empty() -> None:
    checks = {"worker": "", "sink kafka": "no broker answers since 10:00"}
    async with Health("127.0.0.1", 0, Metrics(), lambda: checks) as health:
        status, kind, text = await _get(health.port, "/readyz")
        assert (status, kind) == (503, "application/json")
        assert text == (
            '{"ready":false,"checks":{"worker":"ok","sink kafka":"no broker answers since 10:00"}}'
        )
        checks["sink kafka"] = ""
        assert (await _get(health.port, "/readyz"))[0] == 200
        assert (await _get(health.port, "/healthz"))[0] == 200
        assert (await _get(health.port, "/"))[0] == 404


async def test_a_taken_port_is_a_fault_of_the_settings() -> None:
    async with Health("127.0.0.1", 0, Metrics(), dict) as first:
        expected = f"KRONOS_STREAM_HTTP__PORT={first.port}: another program listens"
        with pytest.raises(SettingsError, match=expected):
            async with Health("127.0.0.1", first.port, Metrics(), dict):
                pass
        assert (await _get(first.port, "/healthz"))[0] == 200
    # Given back at once, for whoever starts next.
    async with Health("127.0.0.1", first.port, Metrics(), dict) as second:
        assert second.port == first.port


@pytest.mark.parametrize("host", ["192.0.2.1", "no.such.host.invalid"])
async def test_a_foreign_address_is_a_fault_of_the_settings(host: str) -> None:
    with pytest.raises(SettingsError, match=f"HTTP__HOST={host}: is no address of this machine"):
        async with Health(host, 0, Metrics(), dict):
            pass


async def test_a_client_that_stays_does_not_hold_up_the_end() -> None:
    async with Health("127.0.0.1", 0, Metrics(), dict) as health:
        reader, writer = await asyncio.open_connection("127.0.0.1", health.port)
        writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n")  # and no more
        await writer.drain()
        began = asyncio.get_running_loop().time()
    assert asyncio.get_running_loop().time() - began < 3
    assert await reader.read() == b""
    writer.close()


async def test_a_blocked_event_loop_is_measured() -> None:
    metrics = Metrics()
    watch = asyncio.create_task(watch_loop_lag(metrics))
    await asyncio.sleep(0.05)
    time.sleep(0.5)  # noqa: ASYNC251 - what must never happen
    await asyncio.sleep(0.05)
    watch.cancel()
    assert _above(metrics, 0.1) == 1


def test_an_idle_event_loop_has_no_lag() -> None:
    async def main() -> Metrics:
        metrics = Metrics()
        watch = asyncio.create_task(watch_loop_lag(metrics))
        await asyncio.sleep(60)
        watch.cancel()
        return metrics

    metrics = run_virtual(main())
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
