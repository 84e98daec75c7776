"""Settings of connections and topics: ``KRONOS_STREAM_KAFKA__*``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr, model_validator

from kronos_connectors._shared.tls import SettingNames, TlsFiles

SETTING_NAMES = SettingNames(
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
            raise ValueError("expected host:port, several separated by commas, without a login")
    return text


class KafkaOptions(BaseModel):
    """Settings of the Kafka source, feed and sink, and of ``kronos-stream topics``."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    bootstrap_servers: Annotated[str, AfterValidator(_validate_servers)] = Field(
        examples=["localhost:9092"]
    )
    """Brokers as host:port, several separated by commas."""
    topic_prefix: str = Field(default="kronos", pattern=r"^[A-Za-z0-9._-]{1,200}$")
    """Prefix of topic names: PREFIX.forecasts.v1 and so on."""

    security_protocol: SecurityProtocol = "PLAINTEXT"
    """Encryption (SSL) and login (SASL)."""
    sasl_mechanism: SaslMechanism = "PLAIN"
    """SASL mechanism."""
    sasl_username: str = ""
    """SASL username."""
    sasl_password: SecretStr = SecretStr("")
    """SASL password."""
    ssl_cafile: Path | None = None
    """Authorities that sign the brokers' certificates, PEM; by default the system's."""
    ssl_certfile: Path | None = None
    """Client certificate, PEM, if the brokers require one."""
    ssl_keyfile: Path | None = None
    """Key of the client certificate, PEM, if it is in another file."""
    ssl_key_password: SecretStr = SecretStr("")
    """Password of that key, if it is encrypted."""

    group: str = Field(default="", max_length=200)
    """Consumer group that reads candles; by default PREFIX-forecast in role forecast, and
    PREFIX-ingest for venue kafka. Members of a group share the partitions of a topic, so a daemon
    with its own series needs its own group."""
    history_bars: int = Field(default=2_112, ge=100, le=100_000)
    """Bars of each series that are read back at the start and kept in memory: at least LOOKBACK
    + 64. The default suffices for any model."""

    max_record_bytes: int = Field(default=1_000_000, ge=1_000)
    """Size limit of records, which are not sent if larger; brokers accept 1,048,588 by default."""
    delivery_seconds: float = Field(default=15.0, gt=0)
    """Time limit of a delivery, which is then repeated."""

    partitions: int = Field(default=32, ge=1, le=10_000)
    """Partitions of new topics. Do not change it later: keys would change their partition."""
    replication: int | None = Field(default=None, ge=1, le=10)
    """Replicas of each partition of new topics; by default three, or one per broker if fewer."""
    retention_days: float = Field(default=7.0, gt=0)
    """Retention of forecasts in new topics."""

    @model_validator(mode="after")
    def _validate(self) -> Self:
        if self.security_protocol.startswith("SASL"):
            if not self.sasl_username or not self.sasl_password.get_secret_value():
                raise ValueError(f"{self.security_protocol} needs sasl_username and sasl_password")
        elif self.sasl_username or self.sasl_password.get_secret_value():
            field = "sasl_username" if self.sasl_username else "sasl_password"
            raise ValueError(
                f"{field} is set, but security_protocol {self.security_protocol} has no "
                "login: expected SASL_SSL or SASL_PLAINTEXT"
            )
        self.tls_files.validate(
            ""
            if self.encrypted
            else f"security_protocol {self.security_protocol} does not encrypt: "
            "expected SSL or SASL_SSL"
        )
        return self

    @property
    def encrypted(self) -> bool:
        return self.security_protocol.endswith("SSL")

    @property
    def tls_files(self) -> TlsFiles:
        password = self.ssl_key_password.get_secret_value()
        return TlsFiles(
            self.ssl_cafile, self.ssl_certfile, self.ssl_keyfile, password, SETTING_NAMES
        )

    def client_arguments(self) -> dict[str, Any]:
        """Arguments for any client of aiokafka, with the certificates as they are now.

        Raises CertificateError, an OSError.
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
        if self.encrypted:
            arguments["ssl_context"] = self.tls_files.create_context()
        return arguments
