"""MQTT with TLS and logins on Mosquitto: accepted and refused connections."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from datetime import timedelta
from pathlib import Path
from random import Random
from typing import Any

import pytest
from pydantic import SecretStr, ValidationError

from kronos_connectors.mqtt import SINK, SOURCE, MqttOptions
from kronos_stream.interfaces.diagnostics import CheckedSink, Finding
from kronos_stream.interfaces.sink import Record, Sink, SinkLoginRefused, SinkUnavailable
from kronos_stream.interfaces.source import LoginRefused, SourceCallbacks, SourceError
from kronos_stream.market.candle import Candle, Update
from kronos_stream.market.candle_message import encode_candle
from kronos_stream.market.clock import SystemClock
from kronos_stream.market.series import Series
from tests.support.certificates import CertificateAuthority
from tests.support.mosquitto import Mosquitto

BrokerOf = Callable[..., Mosquitto]

PASSWORD = "open-sesame-12345"  # noqa: S105 - of these tests alone
SERIES = Series.parse("mqtt:BTC/USDT:1m")
PREFIX = "KRONOS_STREAM_MQTT__"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("certificates")


@pytest.fixture(scope="module")
def authority(folder: Path) -> CertificateAuthority:
    return CertificateAuthority(folder)


@pytest.fixture
def broker(make_mosquitto: BrokerOf, authority: CertificateAuthority) -> Iterator[Mosquitto]:
    """A broker that requires TLS and a login."""
    tls = authority.issue("broker")
    with make_mosquitto(tls=tls, users={"me": PASSWORD}) as broker:
        yield broker


def _options(
    broker: Mosquitto, authority: CertificateAuthority | None, **options: Any
) -> MqttOptions:
    settings: dict[str, Any] = {"url": broker.url, "client_id": "test"}
    settings |= {"username": "me", "password": SecretStr(PASSWORD)}
    if authority is not None:
        settings["tls_cafile"] = authority.file
    return MqttOptions(**{**settings, **options})


def _record(sequence: int = 0) -> Record:
    headers = (("ce_id", b"1"), ("content-type", b"application/json"))
    now = time.time_ns() // 1_000_000
    return Record(sequence, "forecast", "binance:BTC/USDT:1m", b"{}", headers, now)


@asynccontextmanager
async def _sink(options: MqttOptions) -> AsyncIterator[Sink]:
    sink = SINK.build(options, SystemClock(), Random(0))
    try:
        yield sink
    finally:
        await sink.close()


async def _error_message(options: MqttOptions) -> tuple[str, bool]:
    """The error of a sink, which source and doctor report, too, and whether it is permanent."""
    began = time.monotonic()
    async with _sink(options) as sink:
        with pytest.raises(SinkUnavailable) as sink_error:
            await sink.start()
    source = SOURCE.build("mqtt", options, SystemClock(), Random(0))
    with pytest.raises(SourceError) as source_error:
        await source.unsupported([SERIES])
    assert time.monotonic() - began < 60
    message, permanent = str(sink_error.value), isinstance(sink_error.value, SinkLoginRefused)
    assert str(source_error.value) == message
    assert isinstance(source_error.value, LoginRefused) is permanent
    assert PASSWORD not in message
    assert "\n" not in message
    finding = await _run_checks(options)
    assert finding.level == "fail"
    assert finding.found == message
    return message, permanent


async def _permanent_error_message(options: MqttOptions) -> tuple[str, bool]:
    """The permanent error of a broker that refuses a client after the handshake.

    Its alert may be lost with the connection, so the login is tried again, as a daemon does.
    """
    for _ in range(5):
        with suppress(AssertionError):
            message, permanent = await _error_message(options)
            if permanent:
                return message, permanent
    return await _error_message(options)


async def _run_checks(options: MqttOptions) -> Finding:
    """Run the checks of doctor."""
    sink = SINK.build(options, SystemClock(), Random(0))
    assert isinstance(sink, CheckedSink)
    (check,) = sink.checks()
    (finding,) = await check.run()
    return finding


async def test_encrypted_forecasts_and_candles(
    broker: Mosquitto, authority: CertificateAuthority
) -> None:
    options = _options(broker, authority)
    updates: list[Update] = []
    source = SOURCE.build("mqtt", options, SystemClock(), Random(0))
    assert await source.unsupported([SERIES]) == {}
    source.subscribe([SERIES])
    running = asyncio.create_task(
        source.run(SourceCallbacks(updates.append, lambda *_: None, lambda _: None))
    )
    # A sink of another client publishes to the topics of the source.
    other = _options(
        broker, authority, client_id="other", candle_topic="x/{venue}/{symbol}/{timeframe}",
        forecast_topic="kronos/candles/{venue}/{symbol}/{timeframe}",
    )  # fmt: skip
    now = time.time_ns() // 1_000_000
    candle = Candle(now - now % 60_000 - 60_000, 1.0, 2.0, 0.5, 1.5, 10.0)
    record = _record()._replace(key=SERIES.name, value=encode_candle(SERIES, candle))
    async with _sink(options) as sink, _sink(other) as feeder:
        await sink.start()
        assert not await sink.deliver([_record(1)])
        await feeder.start()
        async with asyncio.timeout(300):
            while not updates:
                assert not await feeder.deliver([record])
                await asyncio.sleep(0.05)
    assert updates[0].candle == candle
    running.cancel()
    await asyncio.wait([running])
    await source.close()
    assert (await _run_checks(options)).level == "ok"


async def test_refused_login_is_reported(
    broker: Mosquitto, authority: CertificateAuthority
) -> None:
    wrong = SecretStr("wrong-" + PASSWORD)
    message, permanent = await _error_message(_options(broker, authority, password=wrong))
    assert permanent
    assert f"see {PREFIX}USERNAME and {PREFIX}PASSWORD" in message
    message, permanent = await _error_message(
        _options(broker, authority, username="", password=SecretStr(""))
    )
    assert permanent
    assert f"{PREFIX}PASSWORD" in message


async def test_untrusted_broker_is_refused(broker: Mosquitto, folder: Path) -> None:
    untrusted = CertificateAuthority(folder, "untrusted")
    message, permanent = await _error_message(_options(broker, untrusted))
    assert permanent
    assert (
        f"not signed by a trusted authority ({untrusted.file}); set {PREFIX}TLS_CAFILE" in message
    )
    message, _ = await _error_message(_options(broker, None))
    assert "not signed by a trusted authority (the system's authorities)" in message


async def test_certificate_must_be_valid_and_for_this_host(
    make_mosquitto: BrokerOf, authority: CertificateAuthority
) -> None:
    expired = authority.issue("expired", not_after=-timedelta(hours=1))
    with make_mosquitto(tls=expired) as broker:
        message, permanent = await _error_message(_options(broker, authority))
    assert permanent
    assert "the broker's certificate has expired; the broker needs a new one" in message
    with make_mosquitto(tls=authority.issue("elsewhere", ["elsewhere.example"])) as broker:
        message, permanent = await _error_message(_options(broker, authority))
    assert permanent
    assert "is for another host name" in message
    assert f"use a name of the certificate in {PREFIX}URL" in message


async def test_broker_may_require_a_client_certificate(
    make_mosquitto: BrokerOf, authority: CertificateAuthority, folder: Path
) -> None:
    certificate = authority.issue("client", password=PASSWORD)
    client_files: dict[str, Any] = {
        "tls_certfile": certificate.certificate,
        "tls_keyfile": certificate.key,
    }
    with make_mosquitto(tls=authority.issue("broker"), client_ca_file=authority.file) as broker:
        password = SecretStr(PASSWORD)
        async with _sink(
            _options(broker, authority, **client_files, tls_key_password=password)
        ) as sink:
            await sink.start()
            assert not await sink.deliver([_record()])
        with pytest.raises(ValidationError, match=f"{PREFIX}TLS_KEY_PASSWORD is not its password"):
            _options(broker, authority, **client_files)
        message, permanent = await _permanent_error_message(_options(broker, authority))
        assert permanent
        assert f"requires a client certificate; set {PREFIX}TLS_CERTFILE" in message
        untrusted = CertificateAuthority(folder, "unknown").issue("client")
        client_files = {"tls_certfile": untrusted.certificate, "tls_keyfile": untrusted.key}
        message, permanent = await _permanent_error_message(
            _options(broker, authority, **client_files)
        )
        assert permanent
        assert f"rejects our certificate (unknown ca); check that {untrusted[0]}" in message


async def test_encryption_of_one_side_only_is_explained(
    broker: Mosquitto, authority: CertificateAuthority, tmp_path: Path
) -> None:
    plain = broker.url.replace("mqtts", "mqtt")
    message, _ = await _error_message(_options(broker, None, url=plain))
    assert "is it MQTT, and encrypted if the URL says so?" in message
    other = Mosquitto(tmp_path / "other")
    with other:
        encrypted = other.url.replace("mqtt:", "mqtts:")
        message, _ = await _error_message(_options(other, authority, url=encrypted))
    assert "is it MQTT, and encrypted if the URL says so?" in message


async def test_certificate_that_becomes_invalid_is_reported(
    broker: Mosquitto, authority: CertificateAuthority
) -> None:
    """Certificates are read for each connection, since they may be renewed."""
    mine = authority.issue("mine")
    options = _options(broker, authority, tls_certfile=mine.certificate, tls_keyfile=mine.key)
    mine.certificate.write_text("invalid", "utf-8")
    message, permanent = await _error_message(options)
    assert permanent
    assert f"certificate or key cannot be used: {mine.key}" in message
