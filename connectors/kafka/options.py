"""How to reach the brokers, and which topics: ``KRONOS_STREAM_KAFKA__*``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from aiokafka.helpers import create_ssl_context
from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator

SecurityProtocol = Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"]
SaslMechanism = Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"]


class KafkaOptions(BaseModel):
    """Settings of the Kafka sink and of ``kronos-stream topics``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bootstrap_servers: str = Field(min_length=1, description="host:port, more with commas")
    topic_prefix: str = Field("kronos", pattern=r"^[A-Za-z0-9._-]{1,200}$")

    security_protocol: SecurityProtocol = "PLAINTEXT"
    sasl_mechanism: SaslMechanism = "PLAIN"
    sasl_username: str = ""
    sasl_password: SecretStr = SecretStr("")
    ssl_cafile: Path | None = Field(None, description="CA of the brokers, PEM; else the system's")
    ssl_certfile: Path | None = Field(None, description="our certificate, PEM, if they ask for one")
    ssl_keyfile: Path | None = Field(None, description="its key, PEM, if not in the same file")

    max_record_bytes: int = Field(1_000_000, ge=1_000, description="larger ones are not sent")
    delivery_seconds: float = Field(15.0, gt=0, description="deadline of one delivery")

    partitions: int = Field(32, ge=1, le=10_000, description="of new topics; fixed for life")
    replication: int | None = Field(None, ge=1, le=10, description="else 3, or as many as brokers")
    retention_days: float = Field(7.0, gt=0, description="how long forecasts are kept")

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.security_protocol.startswith("SASL"):
            if not self.sasl_username or not self.sasl_password.get_secret_value():
                raise ValueError(f"{self.security_protocol} needs sasl_username and sasl_password")
        elif self.sasl_username:
            raise ValueError(
                f"sasl_username is set, but security_protocol {self.security_protocol} has no "
                "login: expected SASL_SSL or SASL_PLAINTEXT"
            )
        for path in (self.ssl_cafile, self.ssl_certfile, self.ssl_keyfile):
            if path is not None and not path.is_file():
                raise ValueError(f"{path}: no such file")
        return self

    def connection(self) -> dict[str, Any]:
        """Arguments for any client of aiokafka; reads the certificates."""
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
        if self.security_protocol.endswith("SSL"):
            arguments["ssl_context"] = create_ssl_context(
                cafile=self.ssl_cafile, certfile=self.ssl_certfile, keyfile=self.ssl_keyfile
            )
        return arguments
