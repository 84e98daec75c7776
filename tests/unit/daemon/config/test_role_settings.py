"""Settings that each role requires or rejects."""

from __future__ import annotations

import pytest

from kronos_stream.daemon.config.environment import read_settings
from kronos_stream.daemon.config.settings import ENV_PREFIX, SettingsError
from kronos_stream.daemon.roles.forecast import ForecastRole
from kronos_stream.daemon.roles.ingest import IngestRole
from kronos_stream.daemon.roles.standalone import StandaloneRole
from kronos_stream.daemon.service import build_role

BROKER = {"KAFKA__BOOTSTRAP_SERVERS": "localhost:9092"}
INGEST = {"ROLE": "ingest", "SYMBOLS": "binance:BTC/USDT", **BROKER}
FORECAST = {"ROLE": "forecast", "SINKS": "kafka", "MODEL": "nano", **BROKER}


def _environ(given: dict[str, str]) -> dict[str, str]:
    return {f"{ENV_PREFIX}{name}": value for name, value in given.items()}


@pytest.mark.parametrize(
    ("given", "role"),
    [
        ({"SYMBOLS": "binance:BTC/USDT", "SINKS": "kafka", **BROKER}, StandaloneRole),
        (INGEST, IngestRole),
        (FORECAST, ForecastRole),
        (FORECAST | {"SINKS": "jsonl", "JSONL__PATH": "x.jsonl"}, ForecastRole),
    ],
)
def test_role_is_built_from_its_settings(given: dict[str, str], role: type[object]) -> None:
    assert type(build_role(read_settings(_environ(given)))) is role


@pytest.mark.parametrize(
    ("given", "variable", "remedy"),
    [
        (INGEST | {"SINKS": "kafka"}, "SINKS", "unset it, or set it where forecasts are made"),
        (INGEST | {"SYMBOLS": ""}, "SYMBOLS", "set one of them, such as"),
        (INGEST | {"SYMBOLS": "kafka:A/B"}, "SYMBOLS", "name other venues than kafka"),
        (INGEST | {"SYMBOLS": "kafka.eu:A/B"}, "SYMBOLS", "name other venues than kafka.eu"),
        (FORECAST | {"SINKS": ""}, "SINKS", "set it to any of"),
        (
            FORECAST | {"SYMBOLS": "binance:A/B"},
            "SYMBOLS",
            "set it where KRONOS_STREAM_ROLE=ingest",
        ),
        (FORECAST | {"SYMBOLS_FILE": "/x"}, "SYMBOLS_FILE", "in the candle topics"),
        (FORECAST | {"KAFKA__BOOTSTRAP_SERVERS": ""}, "KAFKA__BOOTSTRAP_SERVERS", "is required"),
        (INGEST | {"KAFKA__BOOTSTRAP_SERVERS": ""}, "KAFKA__BOOTSTRAP_SERVERS", "is required"),
        (FORECAST | {"ROLE": "forecaster"}, "ROLE", "'all', 'ingest' or 'forecast'"),
    ],
)
def test_conflict_with_the_role_is_one_problem(
    given: dict[str, str], variable: str, remedy: str
) -> None:
    with pytest.raises(SettingsError) as raised:
        read_settings(_environ(given))
    (problem,) = raised.value.problems
    assert problem.startswith(f"{ENV_PREFIX}{variable}")
    assert remedy in problem
