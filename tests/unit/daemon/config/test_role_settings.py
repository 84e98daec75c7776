"""What each role needs to be told, and what it must not be."""

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


def _environ(told: dict[str, str]) -> dict[str, str]:
    return {f"{ENV_PREFIX}{name}": value for name, value in told.items()}


@pytest.mark.parametrize(
    ("told", "kind"),
    [
        ({"SYMBOLS": "binance:BTC/USDT", "SINKS": "kafka", **BROKER}, StandaloneRole),
        (INGEST, IngestRole),
        (FORECAST, ForecastRole),
        (FORECAST | {"SINKS": "jsonl", "JSONL__PATH": "x.jsonl"}, ForecastRole),
    ],
)
def test_a_role_is_built_from_what_it_needs(told: dict[str, str], kind: type[object]) -> None:
    assert type(build_role(read_settings(_environ(told)))) is kind


@pytest.mark.parametrize(
    ("told", "variable", "cure"),
    [
        (INGEST | {"SINKS": "kafka"}, "SINKS", "unset it, or set it where forecasts are made"),
        (INGEST | {"SYMBOLS": ""}, "SYMBOLS", "set one to what to forecast"),
        (INGEST | {"SYMBOLS": "kafka:A/B"}, "SYMBOLS", "name other venues than kafka"),
        (INGEST | {"SYMBOLS": "kafka.eu:A/B"}, "SYMBOLS", "name other venues than kafka.eu"),
        (FORECAST | {"SINKS": ""}, "SINKS", "set it to any of"),
        (
            FORECAST | {"SYMBOLS": "binance:A/B"},
            "SYMBOLS",
            "set it where KRONOS_STREAM_ROLE=ingest",
        ),
        (FORECAST | {"SYMBOLS_FILE": "/x"}, "SYMBOLS_FILE", "is in the candle topics"),
        (FORECAST | {"KAFKA__BOOTSTRAP_SERVERS": ""}, "KAFKA__BOOTSTRAP_SERVERS", "is not set"),
        (INGEST | {"KAFKA__BOOTSTRAP_SERVERS": ""}, "KAFKA__BOOTSTRAP_SERVERS", "is not set"),
        (FORECAST | {"ROLE": "forecaster"}, "ROLE", "'all', 'ingest' or 'forecast'"),
    ],
)
def test_what_does_not_go_with_a_role_is_one_line(
    told: dict[str, str], variable: str, cure: str
) -> None:
    with pytest.raises(SettingsError) as raised:
        read_settings(_environ(told))
    (problem,) = raised.value.problems
    assert problem.startswith(f"{ENV_PREFIX}{variable}")
    assert cure in problem
