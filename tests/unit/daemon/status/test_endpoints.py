"""HTTP endpoints: responses, access, caching."""

from __future__ import annotations

import asyncio
from urllib.parse import quote

import pytest
from prometheus_client.parser import text_string_to_metric_families

from kronos_stream.daemon.status.endpoints import CachedBody
from kronos_stream.daemon.status.series import LATE_MS
from tests.support.status_harness import (
    BTC,
    MINUTE,
    START,
    StatusHarness,
    body,
    content,
    schema_errors,
)

TOKEN = "a-long-enough-token"  # noqa: S105 - an example


async def _samples(harness: StatusHarness) -> dict[tuple[str, ...], float]:
    """Metrics by name and sorted label values."""
    text = body(await harness.get("/metrics")).decode()
    return {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def test_metrics_are_in_the_format_of_prometheus() -> None:
    harness = StatusHarness()
    harness.metrics.gaps.labels("binance").inc(3)
    response = await harness.get("/metrics")
    assert (response.status, response.content_type) == (200, "text/plain")
    assert (await _samples(harness))["kronos_gaps_total", "binance"] == 3


async def test_metrics_count_series_by_state() -> None:
    harness = StatusHarness(BTC.name, "binance:ETH/USDT:1m", "binance:ETH/USDT:5m", sink="")
    harness.clock.advance(START + MINUTE + LATE_MS + 1)  # bars of one minute are late
    samples = await _samples(harness)
    one_minute = {
        state: samples["kronos_series", *sorted(("1m", "binance", state))]
        for state in ("starting", "live", "held", "silent", "late")
    }
    assert one_minute == {"starting": 0, "live": 0, "held": 0, "silent": 0, "late": 2}
    assert samples["kronos_series", "5m", "binance", "live"] == 1


async def test_metrics_show_readiness() -> None:
    assert (await _samples(StatusHarness(sink="")))["kronos_ready",] == 1
    assert (await _samples(StatusHarness(sink="no broker answers")))["kronos_ready",] == 0


async def test_counters_start_at_zero() -> None:
    """Otherwise Prometheus would miss the first event."""
    harness = StatusHarness()
    harness.metrics.initialise_labels(venues=["binance"], sinks=["kafka"])
    samples = await _samples(harness)
    assert samples["kronos_worker_restarts_total", "crash"] == 0
    assert samples["kronos_outcomes_total", "failed", "skipped"] == 0
    assert samples["kronos_rejected_total", "binance"] == 0
    assert samples["kronos_expired_total", "kafka"] == 0
    assert samples["process_resident_memory_bytes",] > 2**20


async def test_ready_if_no_check_has_a_problem() -> None:
    harness = StatusHarness(worker="", sink="no broker answers since 10:00")
    response = await harness.get("/readyz")
    assert (response.status, response.content_type) == (503, "application/json")
    checks = {"worker": "ok", "sink": "no broker answers since 10:00"}
    assert content(response) == {"ready": False, "checks": checks}
    assert schema_errors("/readyz", response) == []
    assert await StatusHarness(worker="").json("/readyz") == {
        "ready": True,
        "checks": {"worker": "ok"},
    }
    assert (await harness.get("/healthz")).status == 200


async def test_not_alive_while_a_task_is_stalled() -> None:
    harness = StatusHarness(worker="")
    harness.stalled = "delivering to kafka: no progress for 130 s"
    response = await harness.get("/healthz")
    assert (response.status, response.body) == (503, f"{harness.stalled}\n".encode())
    assert schema_errors("/healthz", response) == []


async def test_series_are_listed() -> None:
    harness = StatusHarness(BTC.name)
    harness.record()
    listed = await harness.json("/series")
    assert listed["at"] == "2024-06-18T12:00:00Z"
    (row,) = listed["series"]
    assert (row["series"], row["state"]) == (BTC.name, "live")
    assert row["last_forecast"]["latency_ms"]["compute"] == 34


@pytest.mark.parametrize(
    "path", [BTC.name, quote(BTC.name), quote(BTC.name, safe=""), quote(BTC.name, safe="").lower()]
)
async def test_forecast_is_the_message_of_the_topic(path: str) -> None:
    harness = StatusHarness(BTC.name)
    harness.record(body=b'{"schema": "kronos.forecast/1"}')
    response = await harness.get(f"/forecasts/{path.replace('btc', 'BTC').replace('usdt', 'USDT')}")
    assert (response.status, response.body) == (200, b'{"schema": "kronos.forecast/1"}')


@pytest.mark.parametrize("name", [BTC.name, "nonsense", "", "%FF", "a" * 10_000])
async def test_missing_forecast_is_not_found(name: str) -> None:
    response = await StatusHarness(BTC.name).get(f"/forecasts/{name}")
    assert response.status == 404
    assert schema_errors("/forecasts/{series}", response) == []
    assert "no bar has closed" in content(response)["error"] or name != BTC.name


@pytest.mark.parametrize(
    "path", ["/metrics", "/series", f"/forecasts/{BTC.name}", "/openapi.json", "/unknown"]
)
async def test_token_is_required(path: str) -> None:
    harness = StatusHarness(BTC.name, token=TOKEN)
    harness.record()
    for authorization in (None, "", "Bearer", "Bearer ", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}",
                          TOKEN, f"Basic {TOKEN}", "Bearer \u20ac"):  # fmt: skip
        response = await harness.request(path, authorization)
        assert response.status == 401, authorization
        assert response.headers["WWW-Authenticate"].startswith("Bearer ")
        assert TOKEN.encode() not in body(response)
        if path != "/unknown":
            assert schema_errors(path, response) == []
    for scheme in ("Bearer", "bearer"):
        response = await harness.request(path, f"{scheme} {TOKEN}")
        assert response.status == (404 if path == "/unknown" else 200)


async def test_probes_need_no_token() -> None:
    harness = StatusHarness(token=TOKEN)
    for path in ("/healthz", "/readyz"):
        assert (await harness.get(path)).status == (await harness.get(path, "wrong")).status == 200


@pytest.mark.parametrize(("token", "status"), [(None, 403), (TOKEN, 200)])
async def test_remote_clients_need_a_token_for_series(token: str | None, status: int) -> None:
    harness = StatusHarness(BTC.name, token=token)
    harness.record()
    harness.endpoints.loopback_only = False
    for path in ("/series", f"/forecasts/{BTC.name}"):
        response = await harness.get(path, TOKEN)
        assert response.status == status
        assert schema_errors(path, response) == []
        assert b"KRONOS_STREAM_HTTP__TOKEN" in body(response) or token
    assert (await harness.get("/metrics", TOKEN)).status == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "BREW"])
async def test_endpoints_are_read_only(method: str) -> None:
    response = await StatusHarness(BTC.name).request("/series", method=method)
    assert (response.status, response.headers["Allow"]) == (405, "GET,HEAD")
    assert content(response) == {"error": "all endpoints are read-only: use GET or HEAD"}


async def test_head_is_allowed() -> None:
    assert (await StatusHarness(BTC.name).request("/series", method="HEAD")).status == 200


async def test_unknown_path_lists_the_endpoints() -> None:
    harness = StatusHarness()
    for path in ("/", "/unknown", "/forecasts", "/series/"):
        response = await harness.get(path)
        assert response.status == 404
        assert "/forecasts/SERIES" in content(response)["error"]


async def test_rendering_a_thousand_series_does_not_block_the_event_loop() -> None:
    harness = StatusHarness(*(f"binance:SYMBOL{i}/USDT:1m" for i in range(1_000)))
    for series in harness.tracked:
        harness.record(series, body=b"x" * 6_000)
    turns = 0
    rendering = asyncio.gather(*(harness.get("/series") for _ in range(100)))
    while not rendering.done():
        await asyncio.sleep(0)
        turns += 1
    responses = await rendering
    assert len({id(response.body) for response in responses}) == 1  # they share one
    assert len(content(responses[0])["series"]) == 1_000
    assert turns > 30


async def test_body_is_rendered_again_when_it_has_expired(monkeypatch: pytest.MonkeyPatch) -> None:
    count = 0

    async def render() -> bytes:
        nonlocal count
        count += 1
        await asyncio.sleep(0)
        return b"%d" % count

    cached = CachedBody(render, 1.0)
    assert list(await asyncio.gather(cached.get(), cached.get())) == [b"1", b"1"]
    loop = asyncio.get_running_loop()
    later = loop.time() + 2
    monkeypatch.setattr(loop, "time", lambda: later)
    assert await cached.get() == b"2"
