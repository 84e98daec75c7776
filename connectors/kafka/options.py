"""How to reach the brokers, and which topics: ``KRONOS_STREAM_KAFKA__*``."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr, model_validator

from kronos_connectors._shared import tls

SETTING_NAMES = tls.SettingNames(
    address="KRONOS_STREAM_KAFKA__BOOTSTRAP_SERVERS",
    encryption="KRONOS_STREAM_KAFKA__SECURITY_PROTOCOL",
    cafile="KRONOS_STREAM_KAFKA__SSL_CAFILE",
    certfile="KRONOS_STREAM_KAFKA__SSL_CERTFILE",
    key_password="KRONOS_STREAM_KAFKA__SSL_KEY_PASSWORD",  # noqa: S106 - its name
)

SecurityProtocol = Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"]
SaslMechanism = Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"]


def _validate_servers(text: str) -> str:
    for server in text.split(","):
        host, _, port = server.strip().rpartition(":")
        if "@" in server or not host or not port.isdecimal() or not 0 < int(port) < 65_536:
            raise ValueError("expected host:port, more than one with commas, and no login in it")
    return text


class KafkaOptions(BaseModel):
    """Settings of Kafka as a sink, as a source, and of ``kronos-stream topics``."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    bootstrap_servers: Annotated[str, AfterValidator(_validate_servers)]
    """Brokers as host:port, more than one with commas."""
    topic_prefix: str = Field(default="kronos", pattern=r"^[A-Za-z0-9._-]{1,200}$")
    """How the topics' names begin: PREFIX.forecasts.v1 and so on."""

    security_protocol: SecurityProtocol = "PLAINTEXT"
    """Whether to encrypt (SSL) and to log in (SASL)."""
    sasl_mechanism: SaslMechanism = "PLAIN"
    """How to log in."""
    sasl_username: str = ""
    """As whom."""
    sasl_password: SecretStr = SecretStr("")
    """With which password."""
    ssl_cafile: Path | None = None
    """Who vouches for the brokers, PEM; else the system's authorities."""
    ssl_certfile: Path | None = None
    """Our certificate, PEM, where brokers ask for one."""
    ssl_keyfile: Path | None = None
    """Its key, PEM, if not in the same file."""
    ssl_key_password: SecretStr = SecretStr("")
    """Of that key, where it is encrypted."""

    group: str = Field(default="", max_length=200)
    """Consumer group that candles are read as; else PREFIX-forecast in that role, and PREFIX-ingest
    for venue kafka. Its members share the partitions of a topic, so a daemon that has series of its
    own needs a group of its own."""
    history_bars: int = Field(default=2_112, ge=100, le=100_000)
    """Bars of each series that are read back at the start and kept in memory: at least LOOKBACK and
    64. The default will do for any model."""

    max_record_bytes: int = Field(default=1_000_000, ge=1_000)
    """Larger records are refused unsent; brokers take 1,048,588 bytes unless told otherwise."""
    delivery_seconds: float = Field(default=15.0, gt=0)
    """How long a delivery may take before it is given up and tried anew."""

    partitions: int = Field(default=32, ge=1, le=10_000)
    """Partitions of new topics; fixed for life, since keys move when it changes."""
    replication: int | None = Field(default=None, ge=1, le=10)
    """Copies of each partition of new topics; else three, or as many as there are brokers."""
    retention_days: float = Field(default=7.0, gt=0)
    """How long new topics keep forecasts."""

    @model_validator(mode="after")
    def _validate(self) -> Self:
        if self.security_protocol.startswith("SASL"):
            if not self.sasl_username or not self.sasl_password.get_secret_value():
                raise ValueError(f"{self.security_protocol} needs sasl_username and sasl_password")
        elif self.sasl_username or self.sasl_password.get_secret_value():
            given = "sasl_username" if self.sasl_username else "sasl_password"
            raise ValueError(
                f"{given} is set, but security_protocol {self.security_protocol} has no "
                "login: expected SASL_SSL or SASL_PLAINTEXT"
            )
        self._check_certificates()
        return self

    def _check_certificates(self) -> None:
        paths = (self.ssl_cafile, self.ssl_certfile, self.ssl_keyfile)
        if not self.encrypted and any(paths):
            raise ValueError(
                f"a certificate is set, but security_protocol {self.security_protocol} does not "
                "encrypt: expected SSL or SASL_SSL"
            )
        if self.ssl_keyfile and not self.ssl_certfile:
            raise ValueError("ssl_keyfile is set, but ssl_certfile is not")
        for path in paths:
            if path is not None and not path.is_file():
                raise ValueError(f"{path}: no such file")
        try:
            self.ssl_context()
        except tls.CertificateError as error:
            raise ValueError(str(error)) from None

    @property
    def encrypted(self) -> bool:
        return self.security_protocol.endswith("SSL")

    def ssl_context(self) -> ssl.SSLContext | None:
        """What encrypts, if anything does; reads the certificates. Raises CertificateError."""
        if not self.encrypted:
            return None
        password = self.ssl_key_password.get_secret_value()
        return tls.create_context(
            self.ssl_cafile, self.ssl_certfile, self.ssl_keyfile, password, SETTING_NAMES
        )

    def client_arguments(self) -> dict[str, Any]:
        """Arguments for any client of aiokafka; reads the certificates.

        Raises CertificateError, an OSError: they may have been changed since the start.
        """
        arguments: dict[str, Any] = {
            "bootstrap_servers": self.bootstrap_servers,
            "security_protocol": self.security_protocol,
            "client_id": "kronos-stream",
        }
        if self.security_protocol.startswith("SASL"):
            arguments |= {
                "sasl_mechanism": self.sasl_mechanism,
                "sasl_plain_username": self.sasl_username,
                "sasl_plain_password": self.sasl_password.get_secret_value(),
            }
        if (context := self.ssl_context()) is not None:
            arguments["ssl_context"] = context
        return arguments
