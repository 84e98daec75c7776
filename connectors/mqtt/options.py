"""How to reach the broker, and which topics: ``KRONOS_STREAM_MQTT__*``."""

from __future__ import annotations

import re
import socket
import ssl
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Self
from urllib.parse import SplitResult, urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr, model_validator

from kronos_connectors._shared import tls
from kronos_connectors.mqtt.topics import SERIES_FIELDS, TopicTemplate

SETTING_NAMES = tls.SettingNames(
    address="KRONOS_STREAM_MQTT__URL",
    encryption="whether it is to begin with mqtts:// or mqtt://",
    cafile="KRONOS_STREAM_MQTT__TLS_CAFILE",
    certfile="KRONOS_STREAM_MQTT__TLS_CERTFILE",
    key_password="KRONOS_STREAM_MQTT__TLS_KEY_PASSWORD",  # noqa: S106 - its name
)

_DEFAULT_PORTS = {"mqtt": 1883, "mqtts": 8883}


def _validate_url(text: str) -> str:
    # The text is not repeated: it may hold a password.
    expected = "expected mqtt://host:1883, or mqtts://host:8883 for an encrypted connection"
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        raise ValueError(expected) from None
    if parts.username is not None or parts.password is not None:
        raise ValueError(
            "no user name or password belongs into it: set KRONOS_STREAM_MQTT__USERNAME and "
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
    """Of this machine, for a session is only found again under the same name."""
    return "kronos-stream-" + (re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname())[:100] or "0")


class MqttOptions(BaseModel):
    """Settings of the MQTT source and sink, which speak MQTT 5."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    url: Annotated[str, AfterValidator(_validate_url)]
    """The broker: mqtt://host:1883, or encrypted mqtts://host:8883."""
    username: str = ""
    """As whom to log in."""
    password: SecretStr = SecretStr("")
    """With which password."""
    tls_cafile: Path | None = None
    """Who vouches for the broker, PEM; else the system's authorities."""
    tls_certfile: Path | None = None
    """Our certificate, PEM, where the broker asks for one."""
    tls_keyfile: Path | None = None
    """Its key, PEM, if not in the same file."""
    tls_key_password: SecretStr = SecretStr("")
    """Of that key, where it is encrypted."""
    client_id: str = Field(default_factory=_default_client_id, pattern=r"^[A-Za-z0-9._-]{1,200}$")
    """How our names at the broker begin. Always the same for one daemon, and different for each:
    brokers let only one client of a name in."""

    candle_topic: Annotated[str, _validate_topic({"symbol", "timeframe"}, SERIES_FIELDS)] = (
        "kronos/candles/{venue}/{symbol}/{timeframe}"
    )
    """Where a series' candles come from."""
    forecast_topic: Annotated[str, _validate_topic(SERIES_FIELDS, SERIES_FIELDS)] = (
        "kronos/forecasts/{venue}/{symbol}/{timeframe}"
    )
    """Where its forecasts go; the broker retains the latest."""
    deadletter_topic: Annotated[str, _validate_topic((), ())] = "kronos/deadletter"
    """Where what went no further goes, and why."""
    status_topic: Annotated[str, _validate_topic((), {"client_id"})] = "kronos/status/{client_id}"
    """Where online or offline stands, retained."""

    keepalive: int = Field(default=20, ge=2, le=65_535)
    """Seconds of silence after which the broker is asked whether it is there, and we by it."""
    session_seconds: int = Field(default=3_600, ge=0, lt=2**32 - 1)
    """How long the broker is to keep candles for us while we are away."""
    connect_seconds: float = Field(default=5.0, gt=0, le=300)
    """How long connecting and logging in may take."""
    delivery_seconds: float = Field(default=15.0, gt=0, le=50)
    """How long a delivery may take before it is given up and tried anew."""
    inflight: int = Field(default=100, ge=1, le=65_535)
    """Records on their way at once; fewer if the broker says so."""
    max_record_bytes: int = Field(default=1_000_000, ge=1_000, le=268_435_455)
    """Larger records are refused unsent, and larger messages not taken in."""
    history_bars: int = Field(default=256, ge=100, le=100_000)
    """Closed bars per series that are kept in memory: MQTT has no other history."""

    @model_validator(mode="after")
    def _validate(self) -> Self:
        if self.password.get_secret_value() and not self.username:
            raise ValueError("password is set, but username is not")
        if self.candle_topic == self.forecast_topic:
            raise ValueError("candle_topic is forecast_topic: forecasts would come in as candles")
        paths = (self.tls_cafile, self.tls_certfile, self.tls_keyfile)
        if any(paths) and not self.encrypted:
            raise ValueError(
                "a certificate is set, but the url is not encrypted: expected mqtts://"
            )
        if self.tls_keyfile and not self.tls_certfile:
            raise ValueError("tls_keyfile is set, but tls_certfile is not")
        for path in paths:
            if path is not None and not path.is_file():
                raise ValueError(f"{path}: no such file")
        try:
            self.ssl_context()
        except tls.CertificateError as error:
            raise ValueError(str(error)) from None
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
        """For people."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self._parts.scheme}://{host}:{self.port}"

    def ssl_context(self) -> ssl.SSLContext | None:
        """What encrypts, if anything does; reads the certificates. Raises CertificateError."""
        if not self.encrypted:
            return None
        password = self.tls_key_password.get_secret_value()
        return tls.create_context(
            self.tls_cafile, self.tls_certfile, self.tls_keyfile, password, SETTING_NAMES
        )

    def candle_template(self) -> TopicTemplate:
        return TopicTemplate(
            self.candle_topic, required={"symbol", "timeframe"}, allowed=SERIES_FIELDS
        )

    def forecast_template(self) -> TopicTemplate:
        return TopicTemplate(self.forecast_topic, required=SERIES_FIELDS, allowed=SERIES_FIELDS)

    def status(self) -> str:
        """The status topic."""
        return TopicTemplate(self.status_topic, allowed={"client_id"}).render(
            client_id=self.client_id
        )

    @property
    def _parts(self) -> SplitResult:
        return urlsplit(self.url)
