"""Status endpoints with known series, without sockets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
import orjson
from aiohttp import web
from aiohttp.test_utils import make_mocked_request
from jsonschema import Draft202012Validator
from pydantic import SecretStr

from kronos_stream.bars.sequencer import BarSequencer
from kronos_stream.bars.window import Window
from kronos_stream.daemon.requests import ForecastRequest, ForecastResult
from kronos_stream.daemon.status import openapi
from kronos_stream.daemon.status.endpoints import Endpoints
from kronos_stream.daemon.status.series import SeriesStatusRegistry
from kronos_stream.daemon.telemetry.metrics import Metrics
from kronos_stream.forecast.outlook import build_outlook
from kronos_stream.interfaces.sink import Envelope
from kronos_stream.market.candle import Bar, Candle
from kronos_stream.market.clock import ManualClock
from kronos_stream.market.series import Series

START = 1_718_712_000_000
MINUTE = 60_000
BTC = Series.parse("binance:BTC/USDT:1m")


@dataclass
class TrackedSeries:
    """A series as the intake pipeline keeps it."""

    sequencer: BarSequencer


def make_sequencer(series: Series, bars: int = 3) -> BarSequencer:
    """Sequencer with ``bars`` closed bars, the last of which closes at START."""
    step = series.timeframe.milliseconds or 0
    return BarSequencer(
        series.timeframe,
        Random(0),
        grace_seconds=2.0,
        history_lag_seconds=None,
        fills_empty=True,
        history_bars=10,
        bars=[Bar(Candle(START - (bars - i) * step, 1, 2, 0.5, 1.5, 10, 15)) for i in range(bars)],
        complete=bars > 0,
    )


class StatusHarness:
    """Registry and endpoints of some series, at START."""

    def __init__(self, *names: str, token: str | None = None, **checks: str) -> None:
        self.clock = ManualClock(START)
        self.tracked = {
            series: TrackedSeries(make_sequencer(series)) for series in map(Series.parse, names)
        }
        self.registry = SeriesStatusRegistry(self.clock)
        self.registry.track(lambda: self.tracked)
        self.metrics = Metrics()
        self.stalled = ""
        self.endpoints = Endpoints(
            self.metrics,
            lambda: checks,
            self.registry,
            self.clock,
            stalled=lambda: self.stalled,
            token=None if token is None else SecretStr(token),
        )

    async def request(
        self, path: str, authorization: str | None = None, *, method: str = "GET"
    ) -> web.Response:
        headers = {} if authorization is None else {"Authorization": authorization}
        request = make_mocked_request(method, path, headers)
        self.endpoints.app.freeze()
        response = await self.endpoints.app._handle(request)
        assert isinstance(response, web.Response)
        return response

    async def get(self, path: str, token: str | None = None) -> web.Response:
        return await self.request(path, None if token is None else f"Bearer {token}")

    async def json(self, path: str) -> Any:
        """Return the content of a successful response, which must match the OpenAPI document."""
        response = await self.get(path)
        assert response.status == 200
        assert schema_errors(path, response) == []
        return content(response)

    def record(self, series: Series = BTC, *, reason: str = "", body: bytes = b"{}") -> None:
        """Record a result of the series' last bar: a forecast, or a skip if ``reason`` is given."""
        origin = START - MINUTE
        request = ForecastRequest(series, origin, 1, START, START + 250)
        window = Window(
            series, np.ones((2, 6), np.float32), np.zeros(2, np.int64), 1, 1,
            Candle(origin, 1, 1, 1, 1, 1), ("1 synthetic bar",),
        )  # fmt: skip
        times = [START, START + MINUTE]
        outlook = build_outlook(np.ones((20, 2, 6), np.float32), times, 1.0, [0.5])
        result = ForecastResult(request, window, None if reason else outlook, reason, 1.0, 12, 34)
        messages = [] if reason else [Envelope("forecast", series.name, body, ())]
        self.registry.record([result], messages)


def body(response: web.Response) -> bytes:
    assert isinstance(response.body, bytes)
    return response.body


def content(response: web.Response) -> Any:
    """Parsed JSON body."""
    return orjson.loads(body(response))


def schema_errors(path: str, response: web.Response) -> list[str]:
    """Differences between a response and the OpenAPI document."""
    document = openapi.document()
    name = "/forecasts/{series}" if path.startswith("/forecasts/") else path
    described: Mapping[str, Any] = document["paths"][name]["get"]["responses"][str(response.status)]
    schema = described["content"][response.content_type]["schema"]
    if schema == {"type": "string"} or response.body == b"{}":
        return []
    validator = Draft202012Validator({**schema, "components": document["components"]})
    return [error.message for error in validator.iter_errors(content(response))]
