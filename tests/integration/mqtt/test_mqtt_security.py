"""MQTT with TLS and logins, on a real Mosquitto: who gets in, and what is said to who does not."""

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
    """It speaks TLS and asks for a login."""
    tls = authority.issue("broker")
    with make_mosquitto(tls=tls, users={"me": PASSWORD}) as broker:
        yield broker


def _options(
    broker: Mosquitto, authority: CertificateAuthority | None, **options: Any
) -> MqttOptions:
    given: dict[str, Any] = {"url": broker.url, "client_id": "test"}
    given |= {"username": "me", "password": SecretStr(PASSWORD)}
    if authority is not None:
        given["tls_cafile"] = authority.file
    return MqttOptions(**{**given, **options})


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
    """Error that keeps a sink out, and whether it lasts until the user acts."""
    began = time.monotonic()
    async with _sink(options) as sink:
        with pytest.raises(SinkUnavailable) as refused:
            await sink.start()
    source = SOURCE.build("mqtt", options, SystemClock(), Random(0))
    with pytest.raises(SourceError) as unknown:
        await source.unsupported([SERIES])
    assert str(unknown.value) == str(refused.value)  # a source says the same
    final = isinstance(refused.value, SinkLoginRefused)
    assert isinstance(unknown.value, LoginRefused) is final
    assert time.monotonic() - began < 60
    said = str(refused.value)
    assert PASSWORD not in said
    assert "\n" not in said
    finding = await _run_checks(options)
    assert finding.level == "fail"
    assert finding.found == said
    return said, final


async def _final_error_message(options: MqttOptions) -> tuple[str, bool]:
    """The same, where a broker judges us after the handshake.

    What it says may then be lost with the connection; it is tried again, as a daemon does.
    """
    for _ in range(5):
        with suppress(AssertionError):
            said, final = await _error_message(options)
            if final:
                return said, final
    return await _error_message(options)


async def _run_checks(options: MqttOptions) -> Finding:
    """By doctor."""
    sink = SINK.build(options, SystemClock(), Random(0))
    assert isinstance(sink, CheckedSink)
    (check,) = sink.checks()
    (finding,) = await check.run()
    return finding


async def test_forecasts_go_out_and_candles_come_in_encrypted(
    broker: Mosquitto, authority: CertificateAuthority
) -> None:
    options = _options(broker, authority)
    came: list[Update] = []
    source = SOURCE.build("mqtt", options, SystemClock(), Random(0))
    assert await source.unsupported([SERIES]) == {}
    source.subscribe([SERIES])
    running = asyncio.create_task(
        source.run(SourceCallbacks(came.append, lambda *_: None, lambda _: None))
    )
    # Candles from another client of ours: the sink publishes where the source listens.
    theirs = _options(
        broker, authority, client_id="theirs", candle_topic="x/{venue}/{symbol}/{timeframe}",
        forecast_topic="kronos/candles/{venue}/{symbol}/{timeframe}",
    )  # fmt: skip
    now = time.time_ns() // 1_000_000
    candle = Candle(now - now % 60_000 - 60_000, 1.0, 2.0, 0.5, 1.5, 10.0)
    record = _record()._replace(key=SERIES.name, value=encode_candle(SERIES, candle))
    async with _sink(options) as sink, _sink(theirs) as feeder:
        await sink.start()
        assert not await sink.deliver([_record(1)])
        await feeder.start()
        async with asyncio.timeout(300):
            while not came:
                assert not await feeder.deliver([record])
                await asyncio.sleep(0.05)
    assert came[0].candle == candle
    running.cancel()
    await asyncio.wait([running])
    await source.close()
    assert (await _run_checks(options)).level == "ok"


async def test_a_login_that_is_refused_is_called_that(
    broker: Mosquitto, authority: CertificateAuthority
) -> None:
    wrong = SecretStr("wrong-" + PASSWORD)
    said, final = await _error_message(_options(broker, authority, password=wrong))
    assert final
    assert f"see {PREFIX}USERNAME and {PREFIX}PASSWORD" in said
    said, final = await _error_message(
        _options(broker, authority, username="", password=SecretStr(""))
    )
    assert final
    assert f"{PREFIX}PASSWORD" in said


async def test_a_broker_that_nobody_vouches_for_is_not_spoken_to(
    broker: Mosquitto, folder: Path
) -> None:
    stranger = CertificateAuthority(folder, "stranger")
    said, final = await _error_message(_options(broker, stranger))
    assert final
    assert f"signed by nobody that we trust ({stranger.file}); set {PREFIX}TLS_CAFILE" in said
    said, _ = await _error_message(_options(broker, None))
    assert "signed by nobody that we trust (the system's authorities)" in said


async def test_a_certificate_must_be_in_time_and_of_this_host(
    make_mosquitto: BrokerOf, authority: CertificateAuthority
) -> None:
    expired = authority.issue("expired", not_after=-timedelta(hours=1))
    with make_mosquitto(tls=expired) as broker:
        said, final = await _error_message(_options(broker, authority))
    assert final
    assert "the broker's certificate has expired; the broker needs a new one" in said
    with make_mosquitto(tls=authority.issue("elsewhere", ["elsewhere.example"])) as broker:
        said, final = await _error_message(_options(broker, authority))
    assert final
    assert "is for another name" in said
    assert f"use a name that it holds in {PREFIX}URL" in said


async def test_a_client_may_have_to_show_a_certificate(
    make_mosquitto: BrokerOf, authority: CertificateAuthority, folder: Path
) -> None:
    locked = authority.issue("client", password=PASSWORD)
    ours: dict[str, Any] = {"tls_certfile": locked.certificate, "tls_keyfile": locked.key}
    with make_mosquitto(tls=authority.issue("broker"), client_ca_file=authority.file) as broker:
        password = SecretStr(PASSWORD)
        async with _sink(_options(broker, authority, **ours, tls_key_password=password)) as sink:
            await sink.start()
            assert not await sink.deliver([_record()])
        with pytest.raises(ValidationError, match=f"{PREFIX}TLS_KEY_PASSWORD is not its password"):
            _options(broker, authority, **ours)
        said, final = await _final_error_message(_options(broker, authority))
        assert final
        assert f"asks for a certificate of ours; set {PREFIX}TLS_CERTFILE" in said
        stranger = CertificateAuthority(folder, "unknown").issue("client")
        ours = {"tls_certfile": stranger.certificate, "tls_keyfile": stranger.key}
        said, final = await _final_error_message(_options(broker, authority, **ours))
        assert final
        assert f"turns our certificate down (unknown ca); see whether {stranger[0]}" in said


async def test_either_side_may_encrypt_alone(
    broker: Mosquitto, authority: CertificateAuthority, tmp_path: Path
) -> None:
    plain = broker.url.replace("mqtts", "mqtt")
    said, _ = await _error_message(_options(broker, None, url=plain))
    assert "is it MQTT, and encrypted if the URL says so?" in said
    other = Mosquitto(tmp_path / "other")
    with other:
        encrypted = other.url.replace("mqtt:", "mqtts:")
        said, _ = await _error_message(_options(other, authority, url=encrypted))
    assert "is it MQTT, and encrypted if the URL says so?" in said


async def test_a_certificate_that_is_spoiled_later_is_told(
    broker: Mosquitto, authority: CertificateAuthority
) -> None:
    """They are read at each connection, as they are renewed while a daemon runs."""
    mine = authority.issue("mine")
    options = _options(broker, authority, tls_certfile=mine.certificate, tls_keyfile=mine.key)
    mine.certificate.write_text("spoiled", "utf-8")
    said, final = await _error_message(options)
    assert final
    assert f"certificate or key cannot be used: {mine.key}" in said
