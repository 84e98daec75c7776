"""Candles in and forecasts out over MQTT: the daemon, Mosquitto and other clients as processes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from threading import Event, Lock, Thread
from urllib.parse import unquote

import pytest
from paho.mqtt.client import Client, MQTTv5
from paho.mqtt.enums import CallbackAPIVersion

from kronos_stream.forecast.message import DeadLetter, Forecast
from kronos_stream.market.candle import Candle
from kronos_stream.market.candle_message import encode_candle
from kronos_stream.market.series import Series
from tests.support.daemon_process import DaemonProcess
from tests.support.forecast_audit import audit_forecasts
from tests.support.mosquitto import Mosquitto, Subscriber, publish, retained_messages
from tests.support.processes import wait_for

BrokerOf = Callable[..., Mosquitto]

SERIES = [Series.parse(f"mqtt:{name}/USDT:1s") for name in ("BTC", "ETH", "50%+#")]
SOAK_SECONDS = float(os.environ.get("KRONOS_SOAK_MQTT_SECONDS", "600"))
LOOKBACK = 32


def _topic(series: Series) -> str:
    symbol = series.symbol.replace("%", "%25").replace("/", "%2F")
    symbol = symbol.replace("+", "%2B").replace("#", "%23")
    return f"kronos/candles/mqtt/{symbol}/1s"


class CandlePublisher:
    """Publishes every bar as it closes, with a client of its own.

    After an outage it sends again what the broker has not acknowledged.
    """

    def __init__(self, broker: Mosquitto) -> None:
        self.sent: dict[Series, list[int]] = {series: [] for series in SERIES}
        self._client = Client(CallbackAPIVersion.VERSION2, protocol=MQTTv5)
        self._client.reconnect_delay_set(0.1, 0.2)  # type: ignore[arg-type] # any number will do
        self._client.connect("127.0.0.1", broker.port)
        self._client.loop_start()
        self._end = Event()
        self._lock = Lock()
        self._thread = Thread(target=self._run)

    def start(self) -> None:
        """Publish the history that a context needs, and start the thread."""
        now = time.time_ns() // 1_000_000_000
        for second in range(now - LOOKBACK - 8, now):
            self._publish(second)
        self._next = now
        self._thread.start()

    def close(self) -> None:
        self._end.set()
        self._thread.join()
        self._client.disconnect()
        self._client.loop_stop()

    def _run(self) -> None:
        while not self._end.wait(max(0.0, self._next + 1.02 - time.time())):
            with self._lock:
                self._publish(self._next)
                self._next += 1

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Publish nothing during the block; bars due meanwhile follow after it."""
        with self._lock:
            yield

    def _publish(self, second: int) -> None:
        for i, series in enumerate(SERIES):
            price = 100.0 + i + (second * (7 + i)) % 13
            bar = Candle(1_000 * second, price, price + 1.5, price - 1.5, price + 1, 3.0 + i)
            self._client.publish(_topic(series), encode_candle(series, bar), qos=1)
            self.sent[series].append(bar.time)


@contextmanager
def _feed(broker: Mosquitto) -> Iterator[CandlePublisher]:
    feed = CandlePublisher(broker)
    feed.start()
    try:
        yield feed
    finally:
        feed.close()


def _daemon(folder: Path, broker: Mosquitto, **settings: str) -> DaemonProcess:
    return DaemonProcess(
        folder,
        {
            "SYMBOLS": ",".join(f"mqtt:{series.symbol}" for series in SERIES),
            "TIMEFRAMES": "1s",
            "SINKS": "mqtt",
            "MQTT__URL": broker.url,
            "MQTT__CLIENT_ID": "kronos",
            "MODEL": "nano",
            "LOOKBACK": str(LOOKBACK),
            "HORIZON": "8",
            "PATHS": "20",
            "CATCH_UP": "all",
            **settings,
        },
    )


def _wait_for_more(daemon: DaemonProcess) -> None:
    """Wait until three more forecasts per series are delivered."""
    enough = daemon.metric("kronos_delivered_total") + 3 * len(SERIES)
    wait_for("forecasts", lambda: daemon.metric("kronos_delivered_total") >= enough)


def _wait_until_forecast(feed: CandlePublisher, subscriber: Subscriber) -> None:
    """Wait until the forecasts of the newest bars have arrived; the feed must be paused."""
    sent = {series.name: opens[-1] for series, opens in feed.sent.items()}

    def newest() -> dict[str, int]:
        forecasts = [(key, Forecast.parse(value)) for key, value in _forecasts(subscriber)]
        return {key: round(1_000 * forecast.origin.timestamp()) for key, forecast in forecasts}

    wait_for("forecasts of the newest bars", lambda: newest() == sent, interval=0.2)


def _forecasts(subscriber: Subscriber) -> list[tuple[str, bytes]]:
    """Key and value of each forecast, in the order of arrival."""
    found = []
    for message in subscriber.messages():
        kind, _, rest = message.topic.removeprefix("kronos/").partition("/")
        if kind == "forecasts":
            venue, symbol, timeframe = rest.split("/")
            found.append((f"{venue}:{unquote(symbol)}:{timeframe}", message.payload))
            assert message.properties["content-type"] == "application/json"
            assert dict(message.properties["user-properties"])["type"] == "kronos.forecast/1"
    return found


@pytest.mark.parametrize(
    ("outages", "outage"),
    [
        (1, 3.0),
        pytest.param(
            round(SOAK_SECONDS / 40), 8.0, marks=[pytest.mark.soak, pytest.mark.timeout(7_200)]
        ),
    ],
)
def test_killed_broker_costs_no_bar_and_no_forecast(
    outages: int, outage: float, make_mosquitto: BrokerOf, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        broker = stack.enter_context(make_mosquitto())
        subscriber = stack.enter_context(Subscriber(broker, tmp_path, "kronos/#"))
        daemon = stack.enter_context(_daemon(tmp_path, broker))
        daemon.start()
        daemon.wait_until_ready()
        with _feed(broker) as feed:
            _wait_for_more(daemon)
            publish(broker, _topic(SERIES[0]), b"no candle")
            before = daemon.resident_mib()
            for number in range(1, outages + 1):
                with feed.paused():  # a broker loses what it has not saved yet
                    _wait_until_forecast(feed, subscriber)
                    broker.kill()
                wait_for(
                    "the daemon notices the outage", partial(_missing_forecasts, daemon, number)
                )
                time.sleep(outage)
                broker.start()
                _wait_for_more(daemon)
            grown = daemon.resident_mib() - before
            synthetic = daemon.metric("kronos_synthetic_bars_total")
            skipped = daemon.metric("kronos_outcomes_total", result="skipped")
        _wait_until_forecast(feed, subscriber)
        assert daemon.stop() == 0
        kept = retained_messages(broker)
        decided = daemon.outcome_range(SERIES)
        assert daemon.undelivered() == 0
        found = _forecasts(subscriber)
        letters = [m for m in subscriber.messages() if m.topic == "kronos/deadletter"]

    due = {series: [t for t in feed.sent[series] if first <= t <= last]
           for series, (first, last) in decided.items()}  # fmt: skip
    result = audit_forecasts(found, due)
    print(  # noqa: T201
        f"{outages} times {outage:g} s without a broker: {result.records} forecasts of "
        f"{sum(map(len, due.values()))} bars, {result.duplicates} twice, {skipped:g} skipped, "
        f"{synthetic:g} bars made up, {grown:+.0f} MiB"
    )
    assert len(due) == len(SERIES)
    assert result.problems == []
    assert synthetic == 0  # no bar was lost, although MQTT is their only source
    assert min(last for _, last in decided.values()) >= max(map(max, feed.sent.values()))
    newest = {series.name: last for series, (_, last) in decided.items()}
    latest = [Forecast.parse(kept[topic]) for topic in kept if topic.startswith("kronos/forecasts")]
    assert {one.series: round(one.origin.timestamp() * 1_000) for one in latest} == newest
    assert kept["kronos/status/kronos"] == b"offline"
    assert [DeadLetter.parse(letter.payload).series for letter in letters] == [SERIES[0].name]
    assert not any(letter.topic in kept for letter in letters)
    assert grown < 64


def _missing_forecasts(daemon: DaemonProcess, times: int) -> bool:
    return daemon.metric("kronos_source_events_total", event="lost") >= times


def test_killed_daemon_receives_the_candles_it_missed(
    make_mosquitto: BrokerOf, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        broker = stack.enter_context(make_mosquitto())
        subscriber = stack.enter_context(Subscriber(broker, tmp_path, "kronos/#"))
        daemon = stack.enter_context(_daemon(tmp_path, broker))
        daemon.start()
        daemon.wait_until_ready()
        with _feed(broker) as feed:
            _wait_for_more(daemon)
            with feed.paused():
                _wait_until_forecast(feed, subscriber)
                daemon.kill()
                sent = len(feed.sent[SERIES[0]])
            wait_for("the last will", lambda: _status(subscriber) == b"offline")
            wait_for("more bars", lambda: len(feed.sent[SERIES[0]]) >= sent + 3)
            daemon.start()
            daemon.wait_until_ready()
            assert _status(subscriber) == b"online"
            _wait_for_more(daemon)
            assert daemon.metric("kronos_synthetic_bars_total") == 0
        assert daemon.stop() == 0
        decided = daemon.outcome_range(SERIES)
        found = _forecasts(subscriber)
    due = {series: [t for t in feed.sent[series] if first <= t <= last]
           for series, (first, last) in decided.items()}  # fmt: skip
    assert audit_forecasts(found, due).problems == []
    assert len(due) == len(SERIES)


def _status(subscriber: Subscriber) -> bytes:
    return [m.payload for m in subscriber.messages() if m.topic.startswith("kronos/status/")][-1]


def test_wrong_password_gives_a_one_line_error(make_mosquitto: BrokerOf, tmp_path: Path) -> None:
    with make_mosquitto(users={"me": "right"}) as broker, ExitStack() as stack:
        login = {"MQTT__USERNAME": "me", "MQTT__PASSWORD": "wrong-secret"}
        daemon = stack.enter_context(_daemon(tmp_path, broker, **login))
        daemon.start()
        assert daemon.wait() == 2
        last = daemon.log_file.read_text("utf-8").splitlines()[-1]
        assert last == (
            f"kronos-stream: error: mqtt://127.0.0.1:{broker.port}: not authorized; see "
            "KRONOS_STREAM_MQTT__USERNAME and KRONOS_STREAM_MQTT__PASSWORD, and the broker's "
            "access rules for this user"
        )
        text = daemon.log_file.read_text("utf-8")
        assert "Traceback" not in text
        assert "wrong-secret" not in text
