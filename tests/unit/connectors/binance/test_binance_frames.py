"""Decoding of Binance's frames: every kline is read, and only FrameError is raised."""

from __future__ import annotations

import copy
import gzip
import os
import random
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest

from kronos_connectors.binance.frames import (
    FrameError,
    IgnoredFrame,
    Kline,
    Response,
    ServerShutdown,
    decode,
    read_candle,
)
from kronos_stream.market.candle import Candle
from kronos_stream.market.series import Series
from tests.support.paths import DATA

BTC = Series.parse("binance:BTC/USDT:1m")
STREAMS = {("BTCUSDT", "1m"): BTC}
OPEN = 1_750_000_020_000
CANDLE = Candle(OPEN, 10.5, 12.0, 10.0, 11.25, 3.5, 39.375)


def frame() -> dict[str, Any]:
    kline = {"t": OPEN, "T": OPEN + 59_999, "s": "BTCUSDT", "i": "1m", "f": 1, "L": 9, "n": 9}
    kline |= {"o": "10.5", "h": "12.0", "l": "10.0", "c": "11.25", "v": "3.5", "q": "39.375"}
    kline |= {"x": True, "V": "1", "Q": "11", "B": "0"}
    event = {"e": "kline", "E": OPEN + 60_004, "s": "BTCUSDT", "k": kline}
    return {"stream": "btcusdt@kline_1m", "data": event}


def test_kline_is_decoded_from_combined_and_raw_streams() -> None:
    whole = Kline(BTC, CANDLE, closed=True)
    assert decode(orjson.dumps(frame()), STREAMS) == whole
    assert decode(orjson.dumps(frame()["data"]).decode(), STREAMS) == whole
    still = frame()
    still["data"]["k"]["x"] = False
    still["data"]["E"] = OPEN + 5
    assert decode(orjson.dumps(still), STREAMS) == whole._replace(closed=False)


@pytest.mark.parametrize(
    ("content", "event"),
    [
        ('{"result":null,"id":7}', Response(7, "")),
        ('{"error":{"code":2,"msg":"Invalid request"},"id":3}', Response(3, "Invalid request")),
        ('{"code":2,"msg":"Invalid JSON","id":null}', Response(None, "Invalid JSON")),
        ('{"e":"serverShutdown","E":1}', ServerShutdown()),
        ('{"stream":"!x","data":{"e":"serverShutdown","E":1}}', ServerShutdown()),
        ('{"event":{"e":"serverShutdown","E":1}}', ServerShutdown()),
        ('{"stream":"a@bookTicker","data":{"u":1,"s":"A"}}', IgnoredFrame()),
        ('{"stream":"!ticker@arr","data":[{"e":"24hrTicker"}]}', IgnoredFrame()),
        ('{"e":"trade","s":"BTCUSDT","p":"1"}', IgnoredFrame()),
        ("{}", IgnoredFrame()),
    ],
)
def test_other_messages_are_decoded_or_ignored(content: str, event: object) -> None:
    assert decode(content, STREAMS) == event


def test_klines_of_other_series_are_ignored() -> None:
    for field, value in (("s", "ETHUSDT"), ("i", "5m")):
        other = frame()
        other["data"]["k"][field] = value
        if field == "s":
            other["data"]["s"] = value
        assert decode(orjson.dumps(other), STREAMS) == IgnoredFrame()


def _kline(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda message: message["data"]["k"].update(fields)


def _event(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda message: message["data"].update(fields)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_event(k=None), "without a kline"),
        (_event(s="ETHUSDT"), "as an event of"),
        (_kline(s=1), "symbol and interval"),
        (_kline(t="1750000020000"), "invalid open time"),
        (_kline(t=-60_000), "invalid open time"),
        (_kline(t=True), "invalid open time"),
        (_kline(t=10**16, T=10**16 + 59_999), "invalid open time"),
        (_kline(T=OPEN + 60_000), "close time"),
        (_kline(x=1), "not a boolean"),
        (_kline(x="true"), "not a boolean"),
        (_kline(x=None), "not a boolean"),
        (_event(E=OPEN + 59_000), "event time"),
        (_event(E=None), "event time"),
        (_kline(t=4_102_444_800_000, T=4_102_444_859_999), "event time"),
        (_kline(c=11.25), "invalid numbers"),
        (_kline(c="nan"), "invalid numbers"),
        (_kline(c="1e5"), "invalid numbers"),
        (_kline(c="-11.25"), "invalid numbers"),
        (_kline(c="11.25 "), "invalid numbers"),
        (_kline(q="39.375 "), "invalid numbers"),
        (_kline(c="1_1"), "invalid numbers"),
        (_kline(c=""), "invalid numbers"),
        (_kline(c="\u0661\u0661"), "invalid numbers"),
        (_kline(v=None), "invalid numbers"),
        (_kline(h="9.0"), "enclose"),
        (_kline(l="11.0"), "enclose"),
        (_kline(l="0.0"), "not a price"),
        (_kline(h="9" * 39), "float32"),
    ],
)
def test_invalid_kline_raises_with_the_reason(
    change: Callable[[dict[str, Any]], None], reason: str
) -> None:
    message = frame()
    change(message)
    with pytest.raises(FrameError, match=reason):
        decode(orjson.dumps(message), STREAMS)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b'{"data":3}'])
def test_frame_that_is_not_an_object_raises(content: bytes) -> None:
    with pytest.raises(FrameError):
        decode(content, STREAMS)


def test_numbers_must_be_six_strings() -> None:
    assert read_candle(OPEN, ["1", "2", "1", "1.5", "0", "0"]) == Candle(OPEN, 1, 2, 1, 1.5, 0, 0)
    assert read_candle(OPEN, ["1", "2", "1", "1.5 7", "0"]) is None
    assert read_candle(OPEN, ["1"] * 7) is None


def _mutated(random: random.Random, message: dict[str, Any]) -> bytes:
    """Frame with a random, possibly harmless, mutation."""
    message = copy.deepcopy(message)
    odd: tuple[Any, ...] = (
        None,
        True,
        -1,
        0,
        1e308,
        2**63,
        "",
        "x",
        "NaN",
        "1e999",
        [],
        {},
        [[[]]],
        "\N{GRINNING FACE}",
    )
    for _ in range(random.randrange(3)):
        event = message.get("data", {})
        place = random.choice([message, event, event.get("k")])
        if not isinstance(place, dict) or not place:
            continue
        key = random.choice(list(place))
        if random.random() < 0.2:
            del place[key]
        elif not (place is message and key == "data"):
            place[key] = random.choice(odd)
    raw = bytearray(orjson.dumps(message))
    for _ in range(random.randrange(4)):
        at = random.randrange(len(raw) + 1)
        kind = random.random()
        if kind < 0.5 and at < len(raw):
            raw[at] = random.randrange(256)
        elif kind < 0.7:
            raw[at:at] = random.choice([b"\x00", b"9", b"-", b'"', b"[" * 2_000, b"\xed\xa0\x80"])
        elif kind < 0.9:
            del raw[at : at + random.randrange(1, 40)]
        else:
            del raw[at:]
    return bytes(raw)


def _fuzz(number: int, seed: int) -> Counter[str]:
    source = random.Random(seed)
    counts: Counter[str] = Counter()
    whole = frame()
    for _ in range(number):
        raw = _mutated(source, whole)
        try:
            event = decode(raw, STREAMS)
        except FrameError:
            counts["invalid"] += 1
            continue
        counts[type(event).__name__] += 1
        if isinstance(event, Kline):
            data = orjson.loads(raw).get("data", {})
            kline, candle = data["k"], event.candle
            assert kline["x"] is event.closed
            assert candle.time == kline["t"] == kline["T"] - 59_999
            assert event.series is BTC
            texts = [kline[name] for name in "ohlcvq"]
            assert all(re.fullmatch(r"[0-9]+(\.[0-9]+)?", text) for text in texts)
            assert list(candle[1:]) == [float(text) for text in texts]
            assert not event.closed or (candle.invalid_reason() is None and data["E"] >= kline["T"])
    return counts


def test_mutated_frames_raise_only_frame_errors() -> None:
    counts = _fuzz(20_000, seed=1)
    assert counts["invalid"] > 8_000
    assert counts["Kline"] > 1_000  # some mutations are harmless: the test reaches both sides


@pytest.mark.soak
def test_hundred_thousand_mutated_frames_raise_only_frame_errors() -> None:
    counts = _fuzz(200_000, seed=2)
    print(dict(counts))  # noqa: T201
    assert sum(counts.values()) == 200_000


def _recorded(path: Path) -> tuple[int, int, Counter[str]]:
    """Number of klines by a plain search, number decoded, and counts of other frames."""
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    lines = [line.partition(b": ")[2] for line in content.splitlines()[1:]]
    names = re.compile(rb'"e":"kline".*"s":"(\w+)","i":"(\w+)"')
    there = [m for line in lines if (m := names.search(line))]
    pairs = {(m[1].decode(), m[2].decode()) for m in there}
    streams = {(s, i): Series.parse(f"binance:{s}/X:{i}") for s, i in pairs}
    counts = Counter(type(decode(line, streams)).__name__ for line in lines)
    return len(there), counts.pop("Kline"), counts


@pytest.mark.parametrize("name", ["spot", "usdm"])
def test_every_kline_of_a_recording_is_decoded(name: str) -> None:
    path = DATA / "wire" / f"{name}.frames"
    there, read, others = _recorded(path)
    assert there == read > 100
    assert set(others) == {"IgnoredFrame", "Response"}


@pytest.mark.skipif("KRONOS_WIRE_DATA" not in os.environ, reason="KRONOS_WIRE_DATA is not set")
def test_every_kline_of_own_recordings_is_decoded() -> None:
    for path in sorted(Path(os.environ["KRONOS_WIRE_DATA"]).glob("*.frames*")):
        there, read, others = _recorded(path)
        print(path.name, there, read, dict(others))  # noqa: T201
        assert there == read > 0
