"""Settings of MQTT."""

from __future__ import annotations

from pathlib import Path

import pytest

from kronos_connectors.mqtt.options import MqttOptions
from kronos_stream.daemon.config.environment import read_options
from kronos_stream.daemon.config.settings import SettingsError
from kronos_stream.market.series import Series

_URL = {"KRONOS_STREAM_MQTT__URL": "mqtt://localhost"}


def _read_options(**variables: str) -> MqttOptions:
    settings = {f"KRONOS_STREAM_MQTT__{name}": value for name, value in variables.items()}
    options = read_options("mqtt", {**_URL, **settings})
    assert isinstance(options, MqttOptions)
    return options


def test_url_is_the_only_required_setting() -> None:
    options = _read_options()
    assert (options.host, options.port, options.encrypted) == ("localhost", 1883, False)
    assert (
        options.candle_template().for_series(Series.parse("mqtt:A/B:1m"))
        == "kronos/candles/mqtt/A%2FB/1m"
    )
    assert options.status() == f"kronos/status/{options.client_id}"
    encrypted = _read_options(URL="mqtts://[::1]/")
    assert (encrypted.host, encrypted.port) == ("::1", 8883)
    assert encrypted.address == "mqtts://[::1]:8883"
    assert encrypted.encrypted


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"URL": "localhost:1883"}, "MQTT__URL: expected mqtt://host:1883"),
        ({"URL": "http://localhost"}, "MQTT__URL: expected mqtt://host:1883"),
        ({"URL": "mqtt://localhost:99999"}, "MQTT__URL: expected mqtt://host:1883"),
        ({"URL": "mqtt://localhost/prefix"}, "MQTT__URL: expected mqtt://host:1883"),
        (
            {"URL": "mqtt://me:hunter2@localhost"},
            "MQTT__URL: it must not contain a user name or password: set KRONOS_STREAM_MQTT__",
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
            "test_mqtt_options.py: no certificate in it",
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
def test_invalid_settings_are_reported_in_one_line(variables: dict[str, str], message: str) -> None:
    with pytest.raises(SettingsError) as error:
        _read_options(**variables)
    (problem,) = error.value.problems
    assert problem.startswith("KRONOS_STREAM_MQTT__")
    assert message in problem
    assert "hunter2" not in problem


def test_password_is_read_from_a_file_and_never_shown(tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text("hunter2\n", "utf-8")
    options = _read_options(USERNAME="me", PASSWORD_FILE=str(file))
    assert options.password.get_secret_value() == "hunter2"
    assert "hunter2" not in repr(options) + str(options) + options.model_dump_json()
