"""The MQTT source on Mosquitto: candles, sessions, outages, invalid messages."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest

from kronos_connectors.mqtt import SOURCE, MqttOptions
from kronos_stream.interfaces.source import LoginRefused, Source, SourceCallbacks, SourceError
from kronos_stream.market.candle import Candle, Update
from kronos_stream.market.candle_message import encode_candle
from kronos_stream.market.clock import SystemClock
from kronos_stream.market.series import Series
from tests.support.mosquitto import Mosquitto, publish

BrokerOf = Callable[..., Mosquitto]

_BTC, _ETH = (Series.parse(f"mqtt:{name}/USDT:1m") for name in ("BTC", "ETH"))
_TOPICS = {_BTC: "kronos/candles/mqtt/BTC%2FUSDT/1m", _ETH: "kronos/candles/mqtt/ETH%2FUSDT/1m"}
_START = 1_700_000_040_000


def _candle(number: int) -> Candle:
    price = 100.0 + number
    return Candle(_START + 60_000 * number, price, price + 2, price - 2, price + 1, 5.0)


def _send(broker: Mosquitto, series: Series, *numbers: int) -> None:
    publish(broker, _TOPICS[series], *(encode_candle(series, _candle(n)) for n in numbers))


class _RecordingCallbacks:
    """Callbacks that record their calls."""

    def __init__(self) -> None:
        self.updates: list[Update] = []
        self.rejected: list[tuple[Series | None, str, bytes]] = []
        self.events: list[str] = []
        self.callbacks = SourceCallbacks(self.updates.append, self._reject, self.events.append)

    def _reject(self, series: Series | None, reason: str, raw: bytes) -> None:
        self.rejected.append((series, reason, raw))

    def numbers(self, series: Series) -> list[int]:
        return [
            (update.candle.time - _START) // 60_000
            for update in self.updates
            if update.series == series
        ]


def _source(broker: Mosquitto, *, venue: str = "mqtt", **options: Any) -> Source:
    settings = MqttOptions(**{"url": broker.url, "client_id": "test", **options})
    return SOURCE.build(venue, settings, SystemClock(), Random(0))


@asynccontextmanager
async def _running(
    broker: Mosquitto,
    received: _RecordingCallbacks,
    series: Collection[Series] = (_BTC, _ETH),
    **options: Any,
) -> AsyncIterator[Source]:
    """A source that has subscribed to ``series``."""
    source = _source(broker, **options)
    source.subscribe(series)
    running = asyncio.create_task(source.run(received.callbacks))
    try:
        await _wait_until(lambda: _is_up(source, running))
        yield source
    finally:
        running.cancel()
        await asyncio.wait([running])
        await source.close()


def _is_up(source: Any, running: asyncio.Task[None]) -> bool:
    if running.done():
        running.result()
    return not source._reconnector.problem


def _counted(received: _RecordingCallbacks, event: str, times: int) -> bool:
    return received.events.count(event) == times


def _sockets() -> int:
    found = 0
    for path in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # the descriptor of this listing
            found += path.readlink().name.startswith("socket:")
    return found


async def _wait_until(condition: Callable[[], object], seconds: float = 300.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - no event is set for it
            await asyncio.sleep(0.02)


async def test_candles_arrive_unchanged(make_mosquitto: BrokerOf) -> None:
    received = _RecordingCallbacks()
    with make_mosquitto() as broker:
        async with _running(broker, received) as source:
            before = time.time_ns() // 1_000_000
            await asyncio.to_thread(_send, broker, _BTC, 0, 1, 2)
            still_open = encode_candle(_ETH, _candle(7), closed=False)
            await asyncio.to_thread(publish, broker, _TOPICS[_ETH], still_open)
            await _wait_until(lambda: len(received.updates) == 4)
            assert received.numbers(_BTC) == [0, 1, 2]
            assert [update.closed for update in received.updates] == [True, True, True, False]
            assert received.updates[3].candle == _candle(7)
            assert before <= received.updates[0].received <= time.time_ns() // 1_000_000
            # The history consists of recently closed bars.
            minute = 60_000
            bars = await source.history(_BTC, _START + minute, _START + 9 * minute)
            assert bars == [_candle(1), _candle(2)]
            assert await source.history(_ETH, _START, _START + 9 * minute) == []
    assert not received.rejected
    assert len(asyncio.all_tasks()) == 1


async def test_invalid_messages_are_rejected_with_reasons(make_mosquitto: BrokerOf) -> None:
    received = _RecordingCallbacks()
    with make_mosquitto() as broker:
        async with _running(broker, received) as source:
            await asyncio.to_thread(
                publish,
                broker,
                _TOPICS[_BTC],
                b"no JSON",
                b'{"time": 0, "open": 1}',
                encode_candle(_ETH, _candle(0)),
                b"x" * 9_000,
                encode_candle(_BTC, _candle(1)._replace(high=1.0)),
                encode_candle(_BTC, _candle(2)),
            )
            await _wait_until(lambda: received.numbers(_BTC) == [1, 2])
            reasons = [reason for _, reason, _ in received.rejected]
            assert len(reasons) == 4
            assert reasons[1].startswith("high")
            assert "names series mqtt:ETH/USDT:1m, its key or topic mqtt:BTC" in reasons[2]
            assert {series for series, _, _ in received.rejected} == {_BTC}
            assert len(received.rejected[3][2]) == 4_096
            # The daemon validates values; history must not contain invalid bars.
            assert await source.history(_BTC, 0, 2 * _START) == [_candle(2)]


async def test_messages_sent_while_disconnected_arrive_later(make_mosquitto: BrokerOf) -> None:
    with make_mosquitto() as broker:
        first = _RecordingCallbacks()
        async with _running(broker, first):
            await asyncio.to_thread(_send, broker, _BTC, 0)
            await _wait_until(lambda: first.numbers(_BTC) == [0])
        await asyncio.to_thread(_send, broker, _BTC, *range(1, 101))
        again = _RecordingCallbacks()
        async with _running(broker, again):
            await _wait_until(lambda: len(again.updates) >= 100)
            assert again.numbers(_BTC) == list(range(1, 101))
        # Without a session, no message is kept.
        async with _running(broker, _RecordingCallbacks(), session_seconds=0):
            pass
        await asyncio.to_thread(_send, broker, _BTC, 101)
        without = _RecordingCallbacks()
        async with _running(broker, without, session_seconds=0):
            await asyncio.to_thread(_send, broker, _BTC, 102)
            await _wait_until(lambda: without.numbers(_BTC) == [102])


async def test_reconnects_after_the_broker_is_killed(make_mosquitto: BrokerOf) -> None:
    received = _RecordingCallbacks()
    with make_mosquitto() as broker:
        async with _running(broker, received) as source:
            await asyncio.to_thread(_send, broker, _BTC, 0)
            await _wait_until(lambda: received.numbers(_BTC) == [0])
            for number in (1, 2, 3):
                await asyncio.to_thread(broker.kill)
                await _wait_until(partial(_counted, received, "lost", number))
                with pytest.raises(SourceError, match="mqtt://127"):
                    await source.history(_BTC, _START, _START + 60_000)
                await asyncio.to_thread(broker.start)
                # The broker has saved the session, so this may arrive before the reconnect.
                await asyncio.to_thread(_send, broker, _BTC, number)
                await _wait_until(
                    lambda: received.numbers(_BTC)[-1] == received.events.count("lost")
                )
            # QoS 1: a message may be repeated if the broker was killed before it saved the PUBACK.
            assert [*dict.fromkeys(received.numbers(_BTC))] == [0, 1, 2, 3]
            # The event may come after the messages of the session.
            await _wait_until(lambda: received.events.count("connected") == 4)


async def test_subscriptions_change_while_running(make_mosquitto: BrokerOf) -> None:
    received = _RecordingCallbacks()
    with make_mosquitto() as broker:
        async with _running(broker, received, [_BTC]) as source:
            await asyncio.to_thread(_send, broker, _BTC, 0)
            await _wait_until(lambda: received.numbers(_BTC) == [0])
            assert await source.unsupported([_ETH]) == {}  # as at a reload
            source.subscribe([_BTC, _ETH])
            await _wait_until(lambda: "SUBACK" in broker.log_file.read_text().rpartition("ETH")[2])
            await asyncio.to_thread(_send, broker, _ETH, 1)
            await _wait_until(lambda: received.numbers(_ETH) == [1])
            source.subscribe([_ETH])
            await _wait_until(lambda: "UNSUBACK" in broker.log_file.read_text())
            await asyncio.to_thread(_send, broker, _BTC, 2)
            await asyncio.to_thread(_send, broker, _ETH, 3)
            await _wait_until(lambda: received.numbers(_ETH) == [1, 3])
            assert received.numbers(_BTC) == [0]
        # The session keeps an old subscription until one of its messages arrives.
        async with _running(broker, received, [_BTC]):
            await asyncio.to_thread(_send, broker, _ETH, 4)
            await _wait_until(lambda: "not followed" in received.events)
            await _wait_until(lambda: broker.log_file.read_text().count("UNSUBACK") == 2)
            await asyncio.to_thread(_send, broker, _ETH, 5)
            await asyncio.to_thread(_send, broker, _BTC, 6)
            await _wait_until(lambda: received.numbers(_BTC) == [0, 6])
            assert received.events.count("not followed") == 1


async def test_refused_logins_and_topics_are_reported_at_the_start(
    make_mosquitto: BrokerOf,
) -> None:
    broker = make_mosquitto(users={"me": "right"})
    login = {"username": "me", "password": "right"}
    with pytest.raises(SourceError, match=rf"mqtt://127\.0\.0\.1:{broker.port}: .*refused") as away:
        await _source(broker, **login).unsupported([_BTC])
    assert not isinstance(away.value, LoginRefused)
    with broker:
        with pytest.raises(LoginRefused, match="KRONOS_STREAM_MQTT__PASSWORD") as refused:
            await _source(broker, username="me", password="wrong-secret").unsupported([_BTC])  # noqa: S106
        assert "wrong-secret" not in str(refused.value)
        source = _source(broker, **login)
        odd = Series.of("mqtt", "A\nB", _BTC.timeframe)
        assert await source.unsupported([_BTC, odd]) == {
            odd: "a topic cannot contain the control character U+000A"
        }
    assert len(asyncio.all_tasks()) == 1


async def test_duplicate_client_id_is_reported(make_mosquitto: BrokerOf) -> None:
    with make_mosquitto() as broker:
        async with (
            _running(broker, _RecordingCallbacks()) as one,
            _running(broker, _RecordingCallbacks()) as other,
        ):
            sources: list[Any] = [one, other]
            await _wait_until(
                lambda: any("MQTT__CLIENT_ID" in source._reconnector.problem for source in sources)
            )


async def test_source_can_be_cancelled_at_any_moment(make_mosquitto: BrokerOf) -> None:
    with make_mosquitto() as broker:
        sockets = _sockets()
        for turn in range(200):
            source = _source(broker)
            source.subscribe([_BTC])
            running = asyncio.create_task(source.run(_RecordingCallbacks().callbacks))
            for _ in range(
                turn % 40
            ):  # iterations of the event loop, most of them while connecting
                await asyncio.sleep(0 if turn % 3 else 0.0005)
            running.cancel()
            done, _ = await asyncio.wait([running], timeout=300)
            assert done, f"turn {turn}: not cancelled"
        await _wait_until(lambda: _sockets() == sockets)  # a thread may still be connecting
    assert len(asyncio.all_tasks()) == 1


async def test_venues_share_a_broker(make_mosquitto: BrokerOf) -> None:
    received, other = _RecordingCallbacks(), _RecordingCallbacks()
    other_series = Series.parse("mqtt.desk:BTC/USDT:1m")
    with make_mosquitto() as broker:
        async with (
            _running(broker, received),
            _running(broker, other, [other_series], venue="mqtt.desk"),
        ):
            await asyncio.to_thread(
                publish,
                broker,
                "kronos/candles/mqtt.desk/BTC%2FUSDT/1m",
                encode_candle(other_series, _candle(1)),
            )
            await asyncio.to_thread(_send, broker, _BTC, 2)
            await _wait_until(lambda: received.updates and other.updates)
            assert other.numbers(other_series) == [1]
            assert received.numbers(_BTC) == [2]
