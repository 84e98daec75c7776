"""What the daemon's pages say, and to whom."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any
from urllib.parse import quote

import numpy as np
import orjson
import pytest
from jsonschema import Draft202012Validator
from prometheus_client.parser import text_string_to_metric_families
from pydantic import SecretStr

from kronos_stream.bars.sequencer import BarSequencer
from kronos_stream.bars.window import Window
from kronos_stream.cli import main
from kronos_stream.daemon.requests import ForecastRequest, ForecastResult
from kronos_stream.daemon.status import openapi
from kronos_stream.daemon.status import series as board_module
from kronos_stream.daemon.status.endpoints import Endpoints, Response
from kronos_stream.daemon.status.series import LATE_MS, SeriesStatusRegistry
from kronos_stream.daemon.telemetry.metrics import Metrics
from kronos_stream.forecast.outlook import build_outlook
from kronos_stream.interfaces.sink import Envelope
from kronos_stream.market.candle import Bar, Candle
from kronos_stream.market.clock import ManualClock
from kronos_stream.market.series import Series
from tests.support.paths import ROOT

START = 1_718_712_000_000
MINUTE = 60_000
TOKEN = "a-long-enough-token"  # noqa: S105 - of this test alone
BTC = Series.parse("binance:BTC/USDT:1m")
_DOCS = ROOT / "docs"

Json = dict[str, Any]


@dataclass
class TrackedSeries:
    """As the desk has it."""

    sequencer: BarSequencer


def _make_sequencer(series: Series, bars: int = 3, *, synthetic: bool = False) -> BarSequencer:
    """Of ``bars`` closed bars, the last of which closes at START."""
    step = series.timeframe.milliseconds or 0
    known = [
        Bar(Candle(START - (bars - i) * step, 1, 2, 0.5, 1.5, 10, 15), synthetic=synthetic)
        for i in range(bars)
    ]
    return BarSequencer(
        series.timeframe,
        Random(0),
        grace_seconds=2.0,
        history_lag_seconds=None,
        fills_empty=True,
        history_bars=10,
        bars=known,
        complete=bool(known),
    )


class StatusHarness:
    """A board and pages of some series, at START."""

    def __init__(self, *names: str, token: str | None = None, **checks: str) -> None:
        self.clock = ManualClock(START)
        self.followed = {
            one: TrackedSeries(_make_sequencer(one)) for one in map(Series.parse, names)
        }
        self.board = SeriesStatusRegistry(self.clock)
        self.board.track(lambda: self.followed)
        self.metrics = Metrics()
        secret = None if token is None else SecretStr(token)
        self.stalled = ""
        self.pages = Endpoints(
            self.metrics,
            lambda: checks,
            self.board,
            self.clock,
            stalled=lambda: self.stalled,
            token=secret,
        )

    async def get(self, path: str, token: str | None = None) -> Response:
        return await self.pages.handle("GET", path, None if token is None else f"Bearer {token}")

    async def json(self, path: str) -> Any:
        answer = await self.get(path)
        assert answer.status == 200
        assert _faults(path, answer) == []
        return orjson.loads(answer.body)

    async def fresh_series_row(self) -> Json:
        self.pages = Endpoints(self.metrics, dict, self.board, self.clock)  # nothing kept
        (row,) = (await self.json("/series"))["series"]
        return dict(row)

    def record(self, series: Series = BTC, *, reason: str = "", body: bytes = b"{}") -> None:
        """Something came of the series' last bar."""
        origin = START - MINUTE
        due = ForecastRequest(series, origin, 1, START, START + 250)
        window = Window(
            series, np.ones((2, 6), np.float32), np.zeros(2, np.int64), 1, 1,
            Candle(origin, 1, 1, 1, 1, 1), ("1 synthetic bar",),
        )  # fmt: skip
        drawn = build_outlook(np.ones((20, 2, 6), np.float32), [START, START + MINUTE], 1.0, [0.5])
        made = ForecastResult(due, window, None if reason else drawn, reason, 1.0, 12, 34)
        messages = [] if reason else [Envelope("forecast", series.name, body, ())]
        self.board.record([made], messages)


async def test_metrics_are_what_prometheus_reads() -> None:
    house = StatusHarness()
    house.metrics.gaps.labels("binance").inc(3)
    answer = await house.get("/metrics")
    assert (answer.status, answer.content_type.split(";")[0]) == (200, "text/plain")
    families = text_string_to_metric_families(answer.body.decode())
    samples = [sample[:3] for family in families for sample in family.samples]
    assert ("kronos_gaps_total", {"venue": "binance"}, 3.0) in samples


async def test_metrics_count_series_and_say_whether_all_is_well() -> None:
    house = StatusHarness(BTC.name, "binance:ETH/USDT:1m", "binance:ETH/USDT:5m", sink="")
    house.metrics.initialise_labels(venues=["binance"], sinks=["kafka"])
    house.clock.advance(START + MINUTE + LATE_MS + 1)  # the bars of a minute are late
    body = (await house.get("/metrics")).body.decode()
    samples = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(body)
        for sample in family.samples
    }
    of_a_minute = {
        state: samples["kronos_series", *sorted(("1m", "binance", state))]
        for state in ("starting", "live", "held", "silent", "late")
    }
    assert of_a_minute == {"starting": 0, "live": 0, "held": 0, "silent": 0, "late": 2}
    assert samples["kronos_series", "5m", "binance", "live"] == 1
    assert samples["kronos_ready",] == 1
    # What has not happened yet is told, so that its first time is seen as a rise.
    assert samples["kronos_worker_restarts_total", "crash"] == 0
    assert samples["kronos_outcomes_total", "failed", "skipped"] == 0
    assert samples["kronos_rejected_total", "binance"] == 0
    assert samples["kronos_expired_total", "kafka"] == 0
    assert samples["process_resident_memory_bytes",] > 2**20

    waiting = StatusHarness(sink="no broker answers")
    assert b"kronos_ready 0.0" in (await waiting.get("/metrics")).body


async def test_ready_is_when_every_check_is_empty() -> None:
    broken = StatusHarness(worker="", sink="no broker answers since 10:00")
    answer = await broken.get("/readyz")
    assert (answer.status, answer.content_type) == (503, "application/json")
    checks = {"worker": "ok", "sink": "no broker answers since 10:00"}
    assert orjson.loads(answer.body) == {"ready": False, "checks": checks}
    assert _faults("/readyz", answer) == []
    assert await StatusHarness(worker="").json("/readyz") == {
        "ready": True,
        "checks": {"worker": "ok"},
    }
    assert (await broken.get("/healthz")).status == 200


async def test_what_hangs_is_not_alive() -> None:
    house = StatusHarness(worker="")
    house.stalled = "delivering to kafka: nothing done for 130 s"
    answer = await house.get("/healthz")
    assert (answer.status, answer.body) == (503, f"{house.stalled}\n".encode())
    assert _faults("/healthz", answer) == []


async def test_a_series_is_told_of_as_it_stands() -> None:
    house = StatusHarness(BTC.name)
    assert await house.fresh_series_row() == {
        "series": BTC.name,
        "state": "live",
        "last_bar": {
            "open_time": "2024-06-18T11:59:00Z", "close": 1.5, "revision": 0, "synthetic": False,
        },
        "next_due": "2024-06-18T12:01:00Z",
        "held": 0,
        "owed": 0,
        "last_outcome": None,
        "last_forecast": None,
    }  # fmt: skip
    house.record()
    row = await house.fresh_series_row()
    outcome = {"origin": "2024-06-18T11:59:00Z", "revision": 1, "result": "forecast"}
    assert row["last_outcome"] == {**outcome, "reason": None}
    assert row["last_forecast"] == {
        "origin": "2024-06-18T11:59:00Z",
        "revision": 1,
        "degraded": True,
        "reasons": ["1 synthetic bar"],
        "latency_ms": {"close_to_received": 250, "queued": 12, "compute": 34},
    }
    house.record(reason="overrun")
    later = await house.fresh_series_row()
    assert later["last_outcome"] == {**outcome, "result": "skipped", "reason": "overrun"}
    assert later["last_forecast"] == row["last_forecast"]


async def test_what_is_wrong_with_a_series_is_its_state() -> None:
    house = StatusHarness(BTC.name)
    tape = house.followed[BTC].sequencer
    for ahead in (2, 3):  # the bar at START is missing
        candle = Candle(START + ahead * MINUTE, 1, 2, 0.5, 1.5, 10, 15)
        house.clock.advance(candle.time + MINUTE)
        tape.update(candle, True, house.clock.now())  # noqa: FBT003
    row = await house.fresh_series_row()
    assert (row["state"], row["held"]) == ("late", 2)
    house.clock = house.board._clock = ManualClock(START + 2 * MINUTE - 1)
    assert (await house.fresh_series_row())["state"] == "held"
    tape.silent = True
    assert (await house.fresh_series_row())["state"] == "silent"
    house.followed[BTC] = TrackedSeries(_make_sequencer(BTC, 0))
    row = await house.fresh_series_row()
    assert (row["state"], row["last_bar"], row["next_due"]) == ("starting", None, None)


async def test_a_venue_of_which_nothing_is_heard_is_named() -> None:
    one, two = (f"binance:{name}/USDT:1m" for name in ("A", "B"))
    house = StatusHarness(one, two, "kraken:A/USD:1m")
    venues = ("binance", "kraken", "no series of it")
    silent = house.board.silent_venues
    assert silent(venues) == {}
    house.followed[Series.parse(one)].sequencer.silent = True
    assert silent(venues) == {}
    house.followed[Series.parse(two)].sequencer.silent = True
    assert silent(venues) == {"binance": "nothing is heard of any of its 2 series"}
    house.clock.advance(START + MINUTE + LATE_MS)
    assert set(silent(venues)) == {"binance"}
    house.clock.advance(START + MINUTE + LATE_MS + 1)  # nor has kraken's next bar come
    assert set(silent(venues)) == {"binance", "kraken"}


@pytest.mark.parametrize(
    "path", [BTC.name, quote(BTC.name), quote(BTC.name, safe=""), quote(BTC.name, safe="").lower()]
)
async def test_a_forecast_is_given_as_it_is_on_the_topic(path: str) -> None:
    house = StatusHarness(BTC.name)
    house.record(body=b'{"schema": "kronos.forecast/1"}')
    answer = await house.get(f"/forecasts/{path.replace('btc', 'BTC').replace('usdt', 'USDT')}")
    assert (answer.status, answer.body) == (200, b'{"schema": "kronos.forecast/1"}')


async def test_where_there_is_no_forecast_it_says_why() -> None:
    house = StatusHarness(BTC.name)

    async def why(name: str) -> str:
        answer = await house.get(f"/forecasts/{name}")
        assert answer.status == 404
        assert _faults("/forecasts/{series}", answer) == []
        return str(orjson.loads(answer.body)["error"])

    assert "no bar has closed" in await why(BTC.name)
    for strange in ("binance:ETH/USDT:1m", "nonsense", "", "%FF", "a" * 10_000):
        assert "is followed; /series lists" in await why(strange)
    house.record(reason="warming up")
    assert "not forecast (warming up)" in await why(BTC.name)
    house.record()
    assert (await house.get(f"/forecasts/{BTC.name}")).status == 200
    del house.followed[BTC]
    assert "is followed" in await why(BTC.name)


async def test_forecasts_in_memory_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(board_module, "MAX_BYTES", 2_500)
    series = [Series.parse(f"binance:{name}/USDT:1m") for name in "ABC"]
    house = StatusHarness(*(one.name for one in series))
    for one in (*series, series[0], series[2]):
        house.record(one, body=b"x" * 1_000)
    statuses = [(await house.get(f"/forecasts/{one.name}")).status for one in series]
    assert statuses == [200, 404, 200]
    assert b"not in memory any more" in (await house.get(f"/forecasts/{series[1].name}")).body
    # What is followed no more goes with the next that is told.
    for gone in series[:2]:
        del house.followed[gone]
    house.record(series[2], body=b"y")
    assert house.board._bytes == 1
    assert set(house.board._latest) == set(house.board._messages) == {series[2].name}


_EVERY_PAGE = ["/metrics", "/series", f"/forecasts/{BTC.name}", "/openapi.json", "/nothing"]


@pytest.mark.parametrize("path", _EVERY_PAGE)
async def test_without_the_token_there_is_nothing_to_see(path: str) -> None:
    house = StatusHarness(BTC.name, token=TOKEN)
    house.record()
    for shown in (None, "", "Bearer", "Bearer ", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}",
                  TOKEN, f"Basic {TOKEN}", "Bearer \udcff\u20ac"):  # fmt: skip
        answer = await house.pages.handle("GET", path, shown)
        assert answer.status == 401, shown
        assert dict(answer.headers)["WWW-Authenticate"].startswith("Bearer ")
        assert TOKEN.encode() not in answer.body
        if path != "/nothing":
            assert _faults(path, answer) == []
    for scheme in ("Bearer", "bearer"):
        answer = await house.pages.handle("GET", path, f"{scheme} {TOKEN}")
        assert answer.status == (404 if path == "/nothing" else 200)


async def test_probes_need_no_token() -> None:
    house = StatusHarness(token=TOKEN)
    for path in ("/healthz", "/readyz"):
        assert (await house.get(path)).status == (await house.get(path, "wrong")).status == 200


async def test_others_see_no_series_unless_there_is_a_token() -> None:
    for token, status in ((None, 403), (TOKEN, 200)):
        house = StatusHarness(BTC.name, token=token)
        house.record()
        house.pages.loopback_only = False
        for path in ("/series", f"/forecasts/{BTC.name}"):
            answer = await house.get(path, TOKEN)
            assert answer.status == status
            assert _faults(path, answer) == []
        assert b"KRONOS_STREAM_HTTP__TOKEN" in answer.body or token
        assert (await house.get("/metrics", TOKEN)).status == 200


async def test_pages_are_only_read() -> None:
    house = StatusHarness(BTC.name)
    for method in ("POST", "PUT", "DELETE", "OPTIONS", "BREW"):
        answer = await house.pages.handle(method, "/series", None)
        assert (answer.status, dict(answer.headers)) == (405, {"Allow": "GET, HEAD"})
    assert (await house.pages.handle("HEAD", "/series", None)).status == 200


async def test_a_page_of_a_thousand_series_leaves_others_their_turn() -> None:
    house = StatusHarness(*(f"binance:SYMBOL{i}/USDT:1m" for i in range(1_000)))
    for one in house.followed:
        house.record(one, body=b"x" * 6_000)
    longest, counted = 0.0, 0
    rendering = asyncio.gather(*(house.get("/series") for _ in range(100)))
    while not rendering.done():
        began = time.perf_counter()
        await asyncio.sleep(0)
        longest, counted = max(longest, time.perf_counter() - began), counted + 1
    answers = await rendering
    assert len({id(answer.body) for answer in answers}) == 1  # they share one
    assert len(orjson.loads(answers[0].body)["series"]) == 1_000
    print(f"{counted} turns, the longest {1000 * longest:.1f} ms")  # noqa: T201
    assert counted > 30


async def test_a_page_is_made_anew_when_it_is_old(monkeypatch: pytest.MonkeyPatch) -> None:
    house = StatusHarness(BTC.name)
    loop = asyncio.get_running_loop()
    began = loop.time()
    before = await house.json("/series")
    house.record()
    assert await house.json("/series") == before
    monkeypatch.setattr(loop, "time", lambda: began + 2)
    assert (await house.json("/series"))["series"][0]["last_forecast"] is not None


# The document.


def test_the_document_is_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    for name, text in openapi.documents().items():
        assert (_DOCS / name).read_text("utf-8") == text, "run: kronos-stream schema --write docs"
    with pytest.raises(SystemExit):
        main(["schema", "--openapi"])
    assert json.loads(capsys.readouterr().out) == openapi.document()


async def test_the_document_names_every_page() -> None:
    house = StatusHarness()
    assert orjson.loads((await house.get("/openapi.json")).body) == openapi.document()
    named = set(openapi.document()["paths"]) - {"/forecasts/{series}"}
    assert named == set(house.pages._routes)


def test_the_document_is_sound() -> None:
    document = openapi.document()
    for schema in document["components"]["schemas"].values():
        Draft202012Validator.check_schema(schema)
    references = list(_references(document))
    assert len(references) > 20
    for reference in references:
        found = document
        for part in reference.removeprefix("#/").split("/"):
            found = found[part]
    operations = [path["get"] for path in document["paths"].values()]
    assert len({operation["operationId"] for operation in operations}) == len(operations)
    for name, path in document["paths"].items():
        declared = [f"{{{one['name']}}}" for one in path.get("parameters", ())]
        assert all(one in name for one in declared)
        assert name.count("{") == len(declared)
        assert ("401" in path["get"]["responses"]) is ("security" not in path["get"])


def _faults(path: str, answer: Response) -> list[str]:
    """In what an answer is not as the document says."""
    document = openapi.document()
    name = "/forecasts/{series}" if path.startswith("/forecasts/") else path
    told: Mapping[str, Any] = document["paths"][name]["get"]["responses"][str(answer.status)]
    schema = told["content"][answer.content_type.split(";")[0]]["schema"]
    if schema == {"type": "string"} or answer.body == b"{}":
        return []
    whole = {**schema, "components": document["components"]}
    return [fault.message for fault in Draft202012Validator(whole).iter_errors(_parsed(answer))]


def _parsed(answer: Response) -> Any:
    return orjson.loads(answer.body)


def _references(part: Any) -> Iterator[str]:
    if isinstance(part, dict):
        if "$ref" in part:
            yield part["$ref"]
        for inner in part.values():
            yield from _references(inner)
    elif isinstance(part, list):
        for inner in part:
            yield from _references(inner)
