"""Snapshots of the messages: values, keys and headers byte for byte, ids, and commit metadata."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import orjson

from kronos_stream.bars.window import Window
from kronos_stream.daemon.partitions import commit_metadata
from kronos_stream.forecast.compose import Composer, candle, dead_letter, forecast_id, removal
from kronos_stream.forecast.message import DeadLetter, Engine, Forecast, Latency, Model, Sampling
from kronos_stream.forecast.outlook import Outlook, build_outlook
from kronos_stream.interfaces.sink import Envelope
from kronos_stream.market.candle import Bar, Candle
from kronos_stream.market.candle_message import decode_bar, decode_update, encode_candle
from kronos_stream.market.series import Series
from tests.support.snapshots import check_snapshot

_SERIES = Series.parse("binance:BTC/USDT:USDT:5m")
_STEP = 300_000
_ORIGIN = 1_718_709_300_000
_NOW = _ORIGIN + _STEP + 321


def test_forecasts() -> None:
    plain = _forecast()
    full = _forecast(
        _window(synthetic=3, revision=2, reasons=("3 synthetic bars", "last bar clipped")),
        _outlook(publish="ohlcva"),
        scale=1024.0,
        created=_NOW // 1000 * 1000,
    )
    derived = _forecast(_window(values=_window().values[:, :5]), _outlook(publish="close"))
    check_snapshot("forecast.txt", _text(plain))
    check_snapshot("forecast-all-fields.txt", _text(full))
    check_snapshot("forecast-closes.txt", _text(derived))
    for message in (plain, full, derived):
        assert Forecast.parse(message.value).encode() == message.value


def test_forecast_ids() -> None:
    messages = {
        "plain": _forecast(),
        "revised": _forecast(_window(revision=1)),
        "scaled, with paths": _forecast(outlook=_outlook(publish="close"), scale=2.0),
        "other creation time and latency, as plain": _forecast(created=_NOW + 60_000, queued=9.0),
    }
    lines = []
    for name, message in messages.items():
        read = orjson.loads(message.value)
        assert read["id"] == message.id == forecast_id(read)
        lines.append(f"{name}: id {message.id}, context {read['context']['digest']}\n")
    check_snapshot("forecast-ids.txt", "".join(lines))


def test_candles() -> None:
    bar = Bar(Candle(_ORIGIN, 65_000.0, 65_010.5, 64_990.0, 65_005.25, 12.5))
    flat = Candle(_ORIGIN + _STEP, 65_005.25, 65_005.25, 65_005.25, 65_005.25, 0.0, 0.0)
    filled = Bar(flat, revision=3, synthetic=True, received=_NOW)
    messages = {
        "closed bar": candle(_SERIES, bar, history=False, at=_NOW),
        "closed bar with all optional fields": candle(_SERIES, filled, history=True, at=_NOW),
    }
    check_snapshot("candle.txt", _texts(messages))
    for given, history, message in zip(
        (bar, filled), (False, True), messages.values(), strict=True
    ):
        read = decode_bar(message.value, None)
        assert read is not None
        assert tuple(read) == (_SERIES, given, history)


def test_candle_values_of_producers() -> None:
    bar = Candle(_ORIGIN, 65_000.0, 65_010.5, 64_990.0, 65_005.25, 12.5, 812_000.0)
    values = [
        encode_candle(_SERIES, bar),
        encode_candle(_SERIES, bar._replace(amount=None), closed=False),
    ]
    check_snapshot("candle-values.txt", "".join(f"{value.decode()}\n" for value in values))
    assert tuple(decode_update(values[0], None, _NOW)) == (_SERIES, bar, True, _NOW)


def test_removals() -> None:
    check_snapshot("removal.txt", _text(removal(_SERIES.name, at=_NOW)))


def test_dead_letters() -> None:
    name = _SERIES.name
    messages = {
        "frame": dead_letter("frame", "not JSON", b'{"e": "kline', at=_NOW),
        "candle, not UTF-8": dead_letter("candle", "bad low", b"\xff\x00", at=_NOW, series=name),
        "record": dead_letter("record", "too large", b"{}", at=_NOW, series=name, sink="kafka"),
    }
    check_snapshot("dead-letter.txt", _texts(messages))
    for message in messages.values():
        assert DeadLetter.parse(message.value).encode() == message.value


def test_long_dead_letter_is_truncated() -> None:
    letter = DeadLetter.parse(dead_letter("frame", "r" * 3_000, b"a" * 100_000, at=_NOW).value)
    sizes = f"payload {len(letter.payload)}, reason {len(letter.reason)}"
    check_snapshot(
        "dead-letter-long.txt", f"{sizes}, truncated {letter.truncated}, id {letter.id}\n"
    )


def test_commit_metadata() -> None:
    """The text that is committed beside a partition's offset, and what is read back from it."""
    written = {
        "nothing done ahead": commit_metadata.encode_metadata(
            commit_metadata.CommitMetadata(1_200, 488, set()), 5_000
        ),
        "runs and single offsets": commit_metadata.encode_metadata(
            commit_metadata.CommitMetadata(1_200, 488, {5_003, 5_004, 5_005, 5_009}), 5_000
        ),
    }
    lines = [f"{name}: {text}\n" for name, text in written.items()]
    long = commit_metadata.encode_metadata(
        commit_metadata.CommitMetadata(0, 488, set(range(10_000, 60_000, 2))), 10_000
    )
    lines.append(f"cut to length: {len(long)} characters, {long[:60]} ... {long[-20:]}\n")
    other_version = '{"v":2,"start":1,"bars":2,"done":""}'
    for text in (*written.values(), other_version, "", "nonsense"):
        read = commit_metadata.decode_metadata(text, 5_000)
        shown = "unreadable" if read is None else f"{read[0]}, {read[1]}, {sorted(read[2])}"
        lines.append(f"read {text!r}: {shown}\n")
    check_snapshot("commit-metadata.txt", "".join(lines))


def _forecast(
    window: Window | None = None,
    outlook: Outlook | None = None,
    *,
    created: int = _NOW,
    queued: float = 3.5,
    scale: float = 1.0,
) -> Envelope:
    composer = Composer(
        Model(name="nano", revision="0f3a", tokenizer="nano", tokenizer_revision=None),
        Engine(version="0.1.0", device="cpu", dtype="float32"),
        Sampling(paths=3, temperature=1.0, top_k=0, top_p=0.9, seed=0, anchor=True),
    )
    return composer.forecast(
        window or _window(),
        outlook or _outlook(),
        created=created,
        latency=Latency(close_to_received=210.0, queued=queued, compute=48.1),
        scale=scale,
    )


def _window(**changes: Any) -> Window:
    """Ten bars whose values are exact in float32."""
    numbers = np.arange(60, dtype=np.float32).reshape(10, 6)
    values = np.float32(62_000) + numbers / np.float32(4)
    times = _ORIGIN - _STEP * np.arange(9, -1, -1)
    last = Candle(_ORIGIN, 62_013.5, 62_015.75, 62_010.25, 62_014.25, 14.5, 899_206.625)
    return replace(Window(_SERIES, values, times, 0, 0, last, ()), **changes)


def _outlook(**more: Any) -> Outlook:
    """Outlook of three made-up paths of two bars; one candle has to be repaired."""
    paths = np.array(
        [
            [[100, 110, 95, 105, 7, 700], [105, 112, 101, 111, 8, 800]],
            [[100, 104, 90, 92, 6, 600], [92, 93.5, 88.25, 90.125, 5, 450]],
            [[100, 99, 97, 101, -1, -5], [101, 103, 100.1, 102.7, 3, 308.1]],
        ],
        np.float32,
    )
    times = [_ORIGIN + _STEP, _ORIGIN + 2 * _STEP]
    outlook = build_outlook(paths, times, 100.0, (0.25, 0.5, 0.75), **more)
    # The last bits of a logarithm depend on the processor.
    return replace(outlook, summary=replace(outlook.summary, volatility=0.0125))


def _texts(messages: Mapping[str, Envelope]) -> str:
    return "".join(f"## {name}\n{_text(message)}" for name, message in messages.items())


def _text(message: Envelope) -> str:
    """Key, headers and value; the value with a line break after each member."""
    headers = "".join(f"header {name}: {value.decode()}\n" for name, value in message.headers)
    assert dict(message.headers).get("ce_id") == message.id.encode()
    value = message.value.decode().replace(',"', ',\n"')
    return f"key: {message.key}\n{headers}value:\n{value}\n"
