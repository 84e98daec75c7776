"""Composition and parsing of messages, and their ids."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from kronos_stream.bars.window import Window
from kronos_stream.forecast.compose import (
    MAX_PAYLOAD,
    Composer,
    context_digest,
    dead_letter,
    forecast_id,
)
from kronos_stream.forecast.message import (
    DeadLetter,
    Engine,
    Forecast,
    Latency,
    Model,
    Sampling,
    same_forecast,
)
from kronos_stream.forecast.outlook import Outlook, PublishedPaths, build_outlook
from kronos_stream.interfaces.sink import Envelope
from kronos_stream.market.candle import Candle
from kronos_stream.market.series import Series
from kronos_stream.market.utc import parse_time, rfc3339

_SERIES = Series.parse("binance:BTC/USDT:USDT:5m")
_STEP = 300_000
_ORIGIN = 1_718_709_300_000
_NOW = _ORIGIN + _STEP + 321
_MODEL = Model(name="nano", revision="0f3a", tokenizer="nano", tokenizer_revision=None)
_ENGINE = Engine(version="0.1.0", device="cpu", dtype="float32")
_SAMPLING = Sampling(paths=20, temperature=1.0, top_k=0, top_p=0.9, seed=0, anchor=True)
_LATENCY = Latency(close_to_received=210.0, queued=3.5, compute=48.1)


def _window(**changes: Any) -> Window:
    random = np.random.default_rng(3)
    values = (62_000 * np.exp(random.normal(0, 0.001, (96, 6)))).astype(np.float32)
    times = _ORIGIN - _STEP * np.arange(95, -1, -1)
    last = Candle(_ORIGIN, *(float(number) for number in values[-1]))
    return replace(Window(_SERIES, values, times, 0, 0, last, ()), **changes)


def _outlook(*, horizon: int = 8, publish: PublishedPaths = "none") -> Outlook:
    random = np.random.default_rng(4)
    paths = (62_000 * np.exp(random.normal(0, 0.001, (20, horizon, 6)))).astype(np.float32)
    times = [_ORIGIN + _STEP * step for step in range(1, horizon + 1)]
    return build_outlook(paths, times, 62_000.0, (0.05, 0.5, 0.95), publish=publish)


def _compose(
    window: Window | None = None,
    outlook: Outlook | None = None,
    *,
    composer: Composer | None = None,
    created: int = _NOW,
    latency: Latency = _LATENCY,
    scale: float = 1.0,
) -> Envelope:
    composer = composer or Composer(_MODEL, _ENGINE, _SAMPLING)
    return composer.forecast(
        window or _window(), outlook or _outlook(), created=created, latency=latency, scale=scale
    )


@pytest.mark.parametrize(
    "composed",
    [
        _compose(),
        _compose(_window(reasons=("3 synthetic bars", "last bar clipped"), synthetic=3)),
        _compose(_window(values=_window().values[:, :5])),
        _compose(outlook=_outlook(horizon=24, publish="ohlcva"), scale=1024.0),
        _compose(created=_NOW // 1000 * 1000),
    ],
)
def test_composed_forecast_is_reproduced_byte_for_byte_by_the_model(composed: Envelope) -> None:
    read = Forecast.parse(composed.value)
    assert read.encode() == composed.value
    assert (read.id, read.series) == (composed.id, composed.key)
    assert forecast_id(orjson.loads(composed.value)) == composed.id


def test_forecast_contains_the_values_of_window_and_outlook() -> None:
    outlook = _outlook()
    read = Forecast.parse(
        _compose(_window(revision=2, reasons=("2 synthetic bars",)), outlook).value
    )
    assert (read.venue, read.symbol, read.timeframe) == ("binance", "BTC/USDT:USDT", "5m")
    assert parse_time(read.origin.isoformat()) == _ORIGIN
    assert parse_time(read.valid_until.isoformat()) == _ORIGIN + 2 * _STEP
    assert parse_time(read.created_at.isoformat()) == _NOW
    assert (read.revision, read.degraded, read.reasons) == (2, True, ("2 synthetic bars",))
    assert [parse_time(time.isoformat()) for time in read.times] == outlook.times
    for name, bands in outlook.channels.items():
        assert getattr(read, name) == {band: tuple(row) for band, row in bands.items()}
    assert read.summary.model_dump() == outlook.summary.to_dict()
    assert read.context.bars == 96
    assert read.context.amount == "reported"
    assert read.last.close == _window().last.close
    assert read.latency_ms == _LATENCY
    assert read.paths is None


def test_headers_are_a_cloud_event_in_binary_mode() -> None:
    composed = _compose()
    assert dict(composed.headers) == {
        "ce_specversion": b"1.0",
        "ce_id": composed.id.encode(),
        "ce_type": b"kronos.forecast/1",
        "ce_source": b"kronos-stream",
        "ce_time": rfc3339(_NOW).encode(),
        "content-type": b"application/json",
    }


def test_repeated_forecast_has_the_same_id_and_content() -> None:
    first = _compose()
    later = _compose(
        created=_NOW + 60_000, latency=Latency(close_to_received=1, queued=2, compute=3)
    )
    assert first.id == later.id
    assert first.value != later.value
    assert same_forecast(Forecast.parse(first.value), Forecast.parse(later.value))


_OTHER_VALUES = _window().values * np.float32(1.0000002)


@pytest.mark.parametrize(
    "other",
    [
        lambda: _compose(_window(revision=1)),
        lambda: _compose(_window(series=Series.parse("binance:BTC/USDT:5m"))),
        lambda: _compose(_window(values=_OTHER_VALUES)),
        lambda: _compose(_window(times=_window().times - _STEP)),
        lambda: _compose(_window(synthetic=1)),
        lambda: _compose(_window(reasons=("stale",))),
        lambda: _compose(outlook=_outlook(horizon=7)),
        lambda: _compose(outlook=_outlook(publish="close")),
        lambda: _compose(outlook=_outlook(publish="ohlcva")),
        lambda: _compose(scale=2.0),
        lambda: _compose(composer=_composer(model=_MODEL.model_copy(update={"revision": "ffff"}))),
        lambda: _compose(
            composer=_composer(engine=_ENGINE.model_copy(update={"dtype": "bfloat16"}))
        ),
        lambda: _compose(composer=_composer(sampling=_SAMPLING.model_copy(update={"seed": 1}))),
    ],
)
def test_every_input_of_a_forecast_changes_its_id(other: Callable[[], Envelope]) -> None:
    assert other().id != _compose().id


def test_same_forecast_detects_one_changed_number() -> None:
    message = orjson.loads(_compose().value)
    one = Forecast.parse(orjson.dumps(message))
    message["low"]["q05"][3] += 0.01
    assert not same_forecast(one, Forecast.parse(orjson.dumps(message)))


def test_context_digest_does_not_depend_on_the_memory_layout() -> None:
    values, times = _window().values, _window().times
    digest = context_digest(values, times)
    assert context_digest(np.asfortranarray(values), times) == digest
    assert context_digest(values.astype(">f4"), times.astype(">i8")) == digest
    assert context_digest(values, times, 2.0) != digest
    assert context_digest(values[:, :5], times) != digest


def test_parsing_ignores_unknown_fields_and_refuses_invalid_messages() -> None:
    message = orjson.loads(_compose().value)
    assert same_forecast(
        Forecast.parse(orjson.dumps(message | {"mood": "calm"})),
        Forecast.parse(orjson.dumps(message)),
    )
    short = message | {"close": message["close"] | {"q05": [1.0]}}
    with pytest.raises(ValidationError, match=r"close\.q05 has 1 numbers, times 8"):
        Forecast.parse(orjson.dumps(short))
    with pytest.raises(ValidationError, match="schema"):
        Forecast.parse(orjson.dumps(message | {"schema": "kronos.forecast/2"}))
    with pytest.raises(ValidationError):
        Forecast.parse(b"\xff{")


@given(st.binary(max_size=200))
def test_dead_letter_contains_the_payload(payload: bytes) -> None:
    letter = dead_letter("frame", "not JSON", payload, at=_NOW)
    read = DeadLetter.parse(letter.value)
    assert read.encode() == letter.value
    assert read.content() == payload
    assert not read.truncated
    assert (read.series, letter.key, read.sink) == (None, "", None)


@pytest.mark.parametrize(
    ("payload", "kept"),
    [
        (b"a" * MAX_PAYLOAD, MAX_PAYLOAD),
        (b"a" * (MAX_PAYLOAD + 1), MAX_PAYLOAD),
        (("€" * MAX_PAYLOAD).encode(), MAX_PAYLOAD // 3 * 3),
        (b"\xff" * (2 * MAX_PAYLOAD), MAX_PAYLOAD),
    ],
)
def test_long_payload_is_cut_between_characters(payload: bytes, kept: int) -> None:
    letter = dead_letter("record", "too large", payload, at=_NOW, series="x:A:1m", sink="kafka")
    read = DeadLetter.parse(letter.value)
    assert read.content() == payload[:kept]
    assert read.truncated == (kept < len(payload))
    assert (read.series, letter.key, read.sink) == ("x:A:1m", "x:A:1m", "kafka")
    assert dict(letter.headers)["ce_type"] == b"kronos.deadletter/1"


def test_messages_import_no_torch() -> None:
    code = (
        "import sys, kronos_stream.forecast.message, kronos_stream.forecast.compose\n"
        "sys.exit('torch' in sys.modules or 'pandas' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0  # noqa: S603


def _composer(
    model: Model = _MODEL, engine: Engine = _ENGINE, sampling: Sampling = _SAMPLING
) -> Composer:
    return Composer(model, engine, sampling)
