"""What MQTT's connectors decide without a broker: topics, settings, reasons, pauses, suspects."""

from __future__ import annotations

import sys
from pathlib import Path
from random import Random
from typing import Any
from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kronos_connectors._shared.backoff import Backoff
from kronos_connectors.mqtt.options import MqttOptions
from kronos_connectors.mqtt.poison import PoisonTracker
from kronos_connectors.mqtt.reason_codes import NO_RESPONSE, BrokerResponse
from kronos_connectors.mqtt.subscriptions import (
    TOPICS_PER_REQUEST,
    Subscribe,
    Subscriptions,
    Unsubscribe,
)
from kronos_connectors.mqtt.topics import SERIES_FIELDS, TopicTemplate, encode_level, invalid_reason
from kronos_stream.daemon.config.environment import read_options
from kronos_stream.daemon.config.settings import SettingsError
from kronos_stream.market.series import Series
from kronos_stream.market.timeframe import Timeframe

_URL = {"KRONOS_STREAM_MQTT__URL": "mqtt://localhost"}


# Topics.


def test_a_series_has_a_topic_of_its_own() -> None:
    template = TopicTemplate(
        "kronos/{venue}/{symbol}/{timeframe}", required=SERIES_FIELDS, allowed=SERIES_FIELDS
    )
    perpetual = Series.parse("binance:BTC/USDT:USDT:5m")
    assert template.for_series(perpetual) == "kronos/binance/BTC%2FUSDT:USDT/5m"
    odd = Series.parse("mqtt:50%+#1 é:1M")
    assert template.for_series(odd) == "kronos/mqtt/50%25%2B%231 é/1M"


_SYMBOLS = st.text(min_size=1).filter(lambda text: text.strip(" :") == text)


@given(_SYMBOLS, _SYMBOLS)
def test_no_two_symbols_share_a_topic(one: str, other: str) -> None:
    template = TopicTemplate("c/{symbol}/{timeframe}", required={"symbol"}, allowed=SERIES_FIELDS)
    topics = [
        template.for_series(Series.of("mqtt", symbol, Timeframe(1, "m"))) for symbol in (one, other)
    ]
    assert (topics[0] == topics[1]) == (one == other)
    for topic, symbol in zip(topics, (one, other), strict=True):
        assert topic.count("/") == 2
        assert not set("+#") & set(topic)
        assert unquote(topic.split("/")[1]) == symbol


def test_what_no_topic_can_hold_is_said() -> None:
    assert invalid_reason("kronos/candles/mqtt/BTC%2FUSDT/1m") is None
    assert "U+0000" in (invalid_reason("a\0b") or "")
    assert "surrogate" in (invalid_reason("\ud800") or "")
    assert invalid_reason("é" * 32_767) is None
    assert "65,536 bytes" in (invalid_reason("é" * 32_768) or "")
    assert encode_level("plain") == "plain"


# Settings.


def _read_options(**variables: str) -> MqttOptions:
    given = {f"KRONOS_STREAM_MQTT__{name}": value for name, value in variables.items()}
    options = read_options("mqtt", {**_URL, **given})
    assert isinstance(options, MqttOptions)
    return options


def test_defaults_are_enough_once_the_broker_is_named() -> None:
    options = _read_options()
    assert (options.host, options.port, options.ssl_context()) == ("localhost", 1883, None)
    assert (
        options.candle_template().for_series(Series.parse("mqtt:A/B:1m"))
        == "kronos/candles/mqtt/A%2FB/1m"
    )
    assert options.status() == f"kronos/status/{options.client_id}"
    encrypted = _read_options(URL="mqtts://[::1]/")
    assert (encrypted.host, encrypted.port) == ("::1", 8883)
    assert encrypted.address == "mqtts://[::1]:8883"
    assert encrypted.ssl_context() is not None


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"URL": "localhost:1883"}, "MQTT__URL: expected mqtt://host:1883"),
        ({"URL": "http://localhost"}, "MQTT__URL: expected mqtt://host:1883"),
        ({"URL": "mqtt://localhost:99999"}, "MQTT__URL: expected mqtt://host:1883"),
        ({"URL": "mqtt://localhost/prefix"}, "MQTT__URL: expected mqtt://host:1883"),
        (
            {"URL": "mqtt://me:hunter2@localhost"},
            "MQTT__URL: no user name or password belongs into it: set KRONOS_STREAM_MQTT__USERNAME",
        ),
        ({"PASSWORD": "hunter2"}, "password is set, but username is not"),
        ({"CLIENT_ID": "a/b"}, "MQTT__CLIENT_ID: "),
        ({"CANDLE_TOPIC": "c/{symbol}"}, "MQTT__CANDLE_TOPIC: 'c/{symbol}' lacks {timeframe}"),
        (
            {"FORECAST_TOPIC": "f/{timeframe}"},
            "MQTT__FORECAST_TOPIC: 'f/{timeframe}' lacks {symbol} and {venue}",
        ),
        ({"FORECAST_TOPIC": "{venue}/{symbol}/{timeframe}/+"}, "MQTT__FORECAST_TOPIC: "),
        ({"CANDLE_TOPIC": "{symbol}/{timeframe}/{origin}"}, "MQTT__CANDLE_TOPIC: "),
        ({"CANDLE_TOPIC": "{symbol!r}/{timeframe}"}, "MQTT__CANDLE_TOPIC: "),
        ({"CANDLE_TOPIC": "{symbol/{timeframe}"}, "MQTT__CANDLE_TOPIC: "),
        ({"CANDLE_TOPIC": "$SYS/{symbol}/{timeframe}"}, "MQTT__CANDLE_TOPIC: "),
        ({"DEADLETTER_TOPIC": "dead/{symbol}"}, "MQTT__DEADLETTER_TOPIC: "),
        ({"TLS_CAFILE": "/nowhere.pem"}, "a certificate is set, but the url is not encrypted"),
        ({"URL": "mqtts://h", "TLS_CAFILE": "/nowhere.pem"}, "/nowhere.pem: no such file"),
        (
            {"URL": "mqtts://h", "TLS_CAFILE": __file__},
            "test_mqtt_machine.py: no certificate in it",
        ),
        ({"URL": "mqtts://h", "TLS_KEYFILE": __file__}, "tls_certfile is not"),
        (
            {"CANDLE_TOPIC": "{venue}/{symbol}/{timeframe}"}
            | {"FORECAST_TOPIC": "{venue}/{symbol}/{timeframe}"},
            "candle_topic is forecast_topic",
        ),
        ({"HISTORY_BARS": "50"}, "MQTT__HISTORY_BARS: "),
    ],
)
def test_settings_that_cannot_work_are_one_line(variables: dict[str, str], said: str) -> None:
    with pytest.raises(SettingsError) as error:
        _read_options(**variables)
    (problem,) = error.value.problems
    assert problem.startswith("KRONOS_STREAM_MQTT__")
    assert said in problem
    assert "hunter2" not in problem


def test_a_password_may_stand_in_a_file_and_is_never_shown(tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text("hunter2\n", "utf-8")
    options = _read_options(USERNAME="me", PASSWORD_FILE=str(file))
    assert options.password.get_secret_value() == "hunter2"
    assert "hunter2" not in repr(options) + str(options) + options.model_dump_json()


# What a broker means.


@pytest.mark.parametrize(
    ("code", "verdict"),
    [
        (0, "taken"),
        (16, "taken"),  # nobody listens; the broker has it all the same
        (128, "later"),
        (131, "later"),
        (135, "later"),
        (144, "refused"),
        (149, "refused"),
        (151, "later"),
        (153, "refused"),
    ],
)
def test_what_becomes_of_a_record(code: int, verdict: str) -> None:
    assert BrokerResponse(code, "Whatever").publish_outcome == verdict


def test_refused_logins_are_final_and_come_with_a_cure() -> None:
    for code in (134, 135):
        answer = BrokerResponse(code, "Not authorized")
        assert answer.permanent
        assert "KRONOS_STREAM_MQTT__PASSWORD" in str(answer)
    for code in (136, 137, 151, 159):  # unavailable, busy, quota, rate
        assert not BrokerResponse(code, "Busy").permanent
    assert "KRONOS_STREAM_MQTT__CLIENT_ID" in str(BrokerResponse(142, "Session taken over"))
    assert not NO_RESPONSE.permanent
    assert not NO_RESPONSE.caused_by_message
    assert str(NO_RESPONSE) == "connection lost"


# Pauses.


def test_pauses_grow_up_to_a_point_and_differ() -> None:
    backoff = Backoff(Random(0))
    pauses = [backoff.next_delay() for _ in range(2_000)]
    assert 0.125 <= pauses[0] <= 0.25
    assert all(pause <= 10.0 for pause in pauses)
    assert min(pauses[7:]) >= 5.0
    assert len({round(pause, 6) for pause in pauses[7:]}) > 1_900


def test_a_connection_that_held_makes_pauses_short_again() -> None:
    backoff = Backoff(Random(0))
    for i in range(10):
        backoff.connection_ended(1.0)  # one that ends at once is no success
        assert backoff.short_lived == i + 1
        backoff.next_delay()
    assert backoff.next_delay() >= 5.0
    backoff.connection_ended(11.0)
    assert backoff.short_lived == 0
    assert backoff.next_delay() <= 0.25
    backoff.connection_ended(1.0)
    backoff.connection_ended(None)
    assert backoff.short_lived == 0


# Subscriptions.


def _settle(subscriptions: Subscriptions) -> list[Any]:
    """Grant whatever is asked for: the requests."""
    requests: list[Any] = []
    while request := subscriptions.next_request():
        requests.append(request)
        if isinstance(request, Subscribe):
            subscriptions.on_subscribed(request.topics)
        else:
            subscriptions.on_unsubscribed(request.topics)
    return requests


def test_only_the_difference_is_asked_for() -> None:
    subscriptions = Subscriptions()
    subscriptions.set_wanted({"b", "a"})
    assert _settle(subscriptions) == [Subscribe(["a", "b"])]
    subscriptions.set_wanted({"b", "c"})
    assert _settle(subscriptions) == [Unsubscribe(["a"]), Subscribe(["c"])]
    assert _settle(subscriptions) == []


def test_a_new_connection_asks_for_all_in_parts() -> None:
    subscriptions = Subscriptions()
    topics = [f"t{i:04}" for i in range(2 * TOPICS_PER_REQUEST + 1)]
    subscriptions.set_wanted(topics)
    _settle(subscriptions)
    subscriptions.on_connected()
    requests = _settle(subscriptions)
    assert [len(request.topics) for request in requests] == [
        TOPICS_PER_REQUEST,
        TOPICS_PER_REQUEST,
        1,
    ]
    assert [topic for request in requests for topic in request.topics] == topics


def test_what_a_former_session_left_behind_is_ended() -> None:
    subscriptions = Subscriptions()
    subscriptions.set_wanted({"a"})
    _settle(subscriptions)
    assert subscriptions.on_message("a")
    assert not subscriptions.on_message("old")
    assert _settle(subscriptions) == [Unsubscribe(["old"])]
    subscriptions.on_message("b")
    subscriptions.set_wanted({"a", "b"})  # wanted before it could be ended
    assert _settle(subscriptions) == [Subscribe(["b"])]


def test_a_flood_of_strange_topics_takes_no_memory() -> None:
    subscriptions = Subscriptions()
    for i in range(100_000):
        subscriptions.on_message(f"strange/{i}")
    assert sys.getsizeof(subscriptions._unwanted) < 2**20
    assert sum(len(request.topics) for request in _settle(subscriptions)) == 10_000


def test_what_is_refused_is_asked_for_again_later_only() -> None:
    subscriptions = Subscriptions()
    subscriptions.set_wanted({"a", "b"})
    assert subscriptions.next_request() == Subscribe(["a", "b"])
    subscriptions.on_subscribed({"a"})
    subscriptions.refused["b"] = "not authorized"
    assert subscriptions.next_request() is None
    subscriptions.retry_refused()
    assert subscriptions.next_request() == Subscribe(["b"])


# Suspects.


@given(st.sets(st.integers(0, 40), max_size=3), st.integers(1, 12), st.randoms())
def test_the_culprits_are_found_and_nobody_else(bad: set[int], window: int, chance: Random) -> None:
    """A broker that hangs up over some records; those sent with them are in doubt each time."""
    suspects, taken = PoisonTracker(), set[int]()
    records = list(range(20))
    refused: list[int] = []
    for _ in range(200):
        under_way: list[int] = []
        for record in records:
            if suspects.poison_reason(record):
                continue
            if suspects.is_suspect(record) or len(under_way) >= window:
                taken.update(under_way)
                under_way.clear()
            under_way.append(record)
            if record in bad:
                # Of those sent before it any number may have been answered.
                answered = chance.randint(0, len(under_way) - 1)
                suspects.on_disconnected(under_way[answered:], "too large")
                break
            if suspects.is_suspect(record):
                taken.update(under_way)
                under_way.clear()
        else:
            refused = [record for record in records if suspects.poison_reason(record)]
            break
    assert set(refused) == bad & set(records)
    assert taken.isdisjoint(refused)
    suspects.discard(records)
    assert not any(
        suspects.is_suspect(record) or suspects.poison_reason(record) for record in records
    )


def test_one_accident_condemns_nobody() -> None:
    suspects = PoisonTracker()
    suspects.on_disconnected([7], "protocol error")
    assert suspects.is_suspect(7)
    assert suspects.poison_reason(7) is None
    suspects.on_disconnected([7], "packet too large")
    assert suspects.poison_reason(7) == "packet too large"
