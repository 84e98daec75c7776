"""Remedies of venues that do not answer: one each."""

from __future__ import annotations

from kronos_stream.daemon.config.environment import read_settings
from kronos_stream.daemon.config.settings import ENV_PREFIX
from kronos_stream.daemon.doctor.doctor import Doctor
from kronos_stream.interfaces.diagnostics import Finding
from tests.support.ports import free_port

_ADDRESS_REMEDY = "see KRONOS_STREAM_KAFKA__BOOTSTRAP_SERVERS"
_GENERAL_REMEDY = "check that this machine reaches it: network, firewall, the venue's URLs"


async def _finding(values: dict[str, str]) -> Finding:
    own = {"SECRETS_DIR": "/nowhere", "SINKS": "jsonl", "JSONL__PATH": "x", **values}
    settings = read_settings({ENV_PREFIX + name: value for name, value in own.items()})
    skip = {"state", "http", "sinks", "model"}
    (result,) = [result async for result in Doctor(settings).examine(lambda _: None, skip)]
    assert result.finding.level == "fail"
    return result.finding


async def test_remedy_of_the_connector_replaces_the_general_one() -> None:
    servers = f"127.0.0.1:{free_port()}"
    found = await _finding({"SYMBOLS": "kafka:BTC/USDT", "KAFKA__BOOTSTRAP_SERVERS": servers})
    assert found.found.endswith(f"connection refused; {_ADDRESS_REMEDY}")
    assert found.remedy == ""


async def test_error_without_remedy_gets_the_general_one() -> None:
    url = f"mqtt://127.0.0.1:{free_port()}"
    found = await _finding({"SYMBOLS": "mqtt:BTC/USDT", "MQTT__URL": url})
    assert url in found.found
    assert found.remedy == _GENERAL_REMEDY
