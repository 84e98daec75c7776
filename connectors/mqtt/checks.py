"""Checks of the broker by ``kronos-stream doctor``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from uuid import uuid4

from kronos_connectors._shared import tls
from kronos_connectors.mqtt.connection import Connection, MqttConnectionError
from kronos_connectors.mqtt.options import MqttOptions
from kronos_stream.interfaces.diagnostics import Check, Finding

_CLOSE_TIMEOUT_SECONDS = 5.0

_UNREACHABLE_REMEDY = (
    "check that a broker listens at KRONOS_STREAM_MQTT__URL, and whether it expects TLS"
)


def checks(options: MqttOptions) -> Sequence[Check]:
    """Check of the login, of the broker's limits, and that it retains messages."""
    seconds = options.connect_seconds + _CLOSE_TIMEOUT_SECONDS
    return [Check("mqtt", partial(_check_broker, options), seconds)]


async def _check_broker(options: MqttOptions) -> Sequence[Finding]:
    # With its own client id: a broker disconnects the first of two clients with the same id.
    connection = Connection(options, f"{options.client_id}-doctor-{uuid4().hex[:8]}")
    try:
        await connection.open()
    except MqttConnectionError as error:
        explained = error.permanent or error.response.failed
        remedy = "" if explained else _UNREACHABLE_REMEDY
        return [Finding("fail", f"{options.address}: {error}", remedy)]
    finally:
        await connection.close()
    if not connection.retain_available:
        message = (
            f"{options.address}: it retains no messages, so subscribers miss the latest forecasts"
        )
        return [Finding("fail", message, "enable retained messages at the broker")]
    limits = (
        f"{connection.max_packet_size:,} bytes a message, "
        f"{connection.max_inflight} messages at once"
    )
    findings = [Finding("ok", f"{options.address} accepts the login; {limits}")]
    if options.username and not options.encrypted:
        remedy = "use mqtts:// in KRONOS_STREAM_MQTT__URL"
        findings += tls.warn_plaintext_password([options.host], remedy)
    return findings
