"""Settings of the connection and the topics: ``KRONOS_STREAM_MQTT__*``."""

from __future__ import annotations

import re
import socket
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Self
from urllib.parse import SplitResult, urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr, model_validator

from kronos_connectors._shared.tls import SettingNames, TlsFiles
from kronos_connectors.mqtt.topics import SERIES_FIELDS, TopicTemplate

SETTING_NAMES = SettingNames(
    address="KRONOS_STREAM_MQTT__URL",
    encryption="its scheme, mqtts:// or mqtt://",
    cafile="KRONOS_STREAM_MQTT__TLS_CAFILE",
    certfile="KRONOS_STREAM_MQTT__TLS_CERTFILE",
    key_password="KRONOS_STREAM_MQTT__TLS_KEY_PASSWORD",  # noqa: S106 - its name
)

_DEFAULT_PORTS = {"mqtt": 1883, "mqtts": 8883}


def _validate_url(text: str) -> str:
    # Messages do not contain the text, which may contain a password.
    expected = "expected mqtt://host:1883, or mqtts://host:8883 for an encrypted connection"
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        raise ValueError(expected) from None
    if parts.username is not None or parts.password is not None:
        raise ValueError(
            "it must not contain a user name or password: set KRONOS_STREAM_MQTT__USERNAME and "
            "KRONOS_STREAM_MQTT__PASSWORD"
        )
    rest = parts.path.strip("/") or parts.query or parts.fragment
    if parts.scheme not in _DEFAULT_PORTS or not parts.hostname or rest or port == 0:
        raise ValueError(expected)
    return text


def _validate_topic(required: Collection[str], allowed: Collection[str]) -> AfterValidator:
    def check(text: str) -> str:
        TopicTemplate(text, required=required, allowed=allowed)
        return text

    return AfterValidator(check)


def _default_client_id() -> str:
    """The host name: it must be constant, since a session belongs to its client id."""
    return "kronos-stream-" + (re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname())[:100] or "0")


class MqttOptions(BaseModel):
    """Settings of the MQTT source and sink, which use MQTT 5."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    url: Annotated[str, AfterValidator(_validate_url)] = Field(examples=["mqtt://localhost:1883"])
    """The broker: mqtt://host:1883, or encrypted mqtts://host:8883."""
    username: str = ""
    """User name of the login."""
    password: SecretStr = SecretStr("")
    """Password of the login."""
    tls_cafile: Path | None = None
    """Authorities that sign the broker's certificate, PEM; by default the system's."""
    tls_certfile: Path | None = None
    """Client certificate, PEM, if the broker requires one."""
    tls_keyfile: Path | None = None
    """Key of the client certificate, PEM, if it is in another file."""
    tls_key_password: SecretStr = SecretStr("")
    """Password of that key, if it is encrypted."""
    client_id: str = Field(default_factory=_default_client_id, pattern=r"^[A-Za-z0-9._-]{1,200}$")
    """Prefix of the client ids. Constant for one daemon, and different for each: brokers accept
    only one client with the same id."""

    candle_topic: Annotated[str, _validate_topic({"symbol", "timeframe"}, SERIES_FIELDS)] = (
        "kronos/candles/{venue}/{symbol}/{timeframe}"
    )
    """Topic of the candles of a series."""
    forecast_topic: Annotated[str, _validate_topic(SERIES_FIELDS, SERIES_FIELDS)] = (
        "kronos/forecasts/{venue}/{symbol}/{timeframe}"
    )
    """Topic of the forecasts of a series; the broker retains the latest."""
    deadletter_topic: Annotated[str, _validate_topic((), ())] = "kronos/deadletter"
    """Topic of invalid input and refused records, with the reasons."""
    status_topic: Annotated[str, _validate_topic((), {"client_id"})] = "kronos/status/{client_id}"
    """Topic of the status, online or offline, retained."""

    keepalive: int = Field(default=20, ge=2, le=65_535)
    """Keep-alive interval of the connection."""
    session_seconds: int = Field(default=3_600, ge=0, lt=2**32 - 1)
    """How long the broker keeps candles while the daemon is disconnected."""
    connect_seconds: float = Field(default=5.0, gt=0, le=300)
    """Time limit of connecting and logging in."""
    delivery_seconds: float = Field(default=15.0, gt=0, le=50)
    """Time limit of a delivery, which is then repeated."""
    inflight: int = Field(default=100, ge=1, le=65_535)
    """Limit of unacknowledged records; the broker may lower it."""
    max_record_bytes: int = Field(default=1_000_000, ge=1_000, le=268_435_455)
    """Size limit of records, which are not sent if larger, and of received messages."""
    history_bars: int = Field(default=256, ge=100, le=100_000)
    """Closed bars of each series that are kept in memory: MQTT has no other history."""

    @model_validator(mode="after")
    def _validate(self) -> Self:
        if self.password.get_secret_value() and not self.username:
            raise ValueError("password is set, but username is not")
        if self.candle_topic == self.forecast_topic:
            raise ValueError("candle_topic is forecast_topic: forecasts would be read as candles")
        self.tls_files.validate(
            "" if self.encrypted else "the url is not encrypted: expected mqtts://"
        )
        return self

    @property
    def encrypted(self) -> bool:
        return self._parts.scheme == "mqtts"

    @property
    def host(self) -> str:
        return self._parts.hostname or ""

    @property
    def port(self) -> int:
        return self._parts.port or _DEFAULT_PORTS[self._parts.scheme]

    @property
    def address(self) -> str:
        """Scheme, host and port, for messages."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self._parts.scheme}://{host}:{self.port}"

    @property
    def tls_files(self) -> TlsFiles:
        password = self.tls_key_password.get_secret_value()
        return TlsFiles(
            self.tls_cafile, self.tls_certfile, self.tls_keyfile, password, SETTING_NAMES
        )

    def candle_template(self) -> TopicTemplate:
        return TopicTemplate(
            self.candle_topic, required={"symbol", "timeframe"}, allowed=SERIES_FIELDS
        )

    def forecast_template(self) -> TopicTemplate:
        return TopicTemplate(self.forecast_topic, required=SERIES_FIELDS, allowed=SERIES_FIELDS)

    def status(self) -> str:
        return TopicTemplate(self.status_topic, allowed={"client_id"}).render(
            client_id=self.client_id
        )

    @property
    def _parts(self) -> SplitResult:
        return urlsplit(self.url)
