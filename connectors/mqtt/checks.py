"""What ``kronos-stream doctor`` asks the broker."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from uuid import uuid4

from kronos_connectors._shared import tls
from kronos_connectors.mqtt.connection import Connection, MqttConnectionError
from kronos_connectors.mqtt.options import MqttOptions
from kronos_stream.interfaces.diagnostics import Check, Finding

NOT_RETAINED = "it retains no messages, so nobody could have the latest forecasts"

_CLOSE_TIMEOUT_SECONDS = 5.0
"""Than connecting may take: for hanging up."""

_UNREACHABLE_REMEDY = (
    "see KRONOS_STREAM_MQTT__URL, whether a broker listens there, and whether it is encrypted"
)


def checks(options: MqttOptions) -> Sequence[Check]:
    """Whether the broker lets us in, what it takes, and whether it retains it."""
    return [
        Check(
            "mqtt",
            partial(_check_broker, options),
            options.connect_seconds + _CLOSE_TIMEOUT_SECONDS,
        )
    ]


async def _check_broker(options: MqttOptions) -> Sequence[Finding]:
    # Under a name of its own: of two clients with one name a broker throws out the first.
    link = Connection(options, f"{options.client_id}-doctor-{uuid4().hex[:8]}")
    try:
        await link.open()
    except MqttConnectionError as error:
        said = f"{options.address}: {error}"
        return [
            Finding(
                "fail",
                said,
                "" if error.permanent or error.response.failed else _UNREACHABLE_REMEDY,
            )
        ]
    finally:
        await link.close()
    if not link.retain_available:
        return [Finding("fail", f"{options.address}: {NOT_RETAINED}", "have it retain messages")]
    found = f"{link.max_packet_size:,} bytes a message, {link.max_inflight} messages at once"
    findings = [Finding("ok", f"{options.address} lets us in; {found}")]
    if options.username and not options.encrypted and tls.any_remote(options.host):
        cure = "use mqtts:// in KRONOS_STREAM_MQTT__URL"
        findings.append(
            Finding("warn", "the password is sent as it is, to be read on its way", cure)
        )
    return findings
