"""What ``kronos-stream doctor`` asks the broker."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from uuid import uuid4

from kronos_connectors import tls
from kronos_connectors.mqtt.link import Link, LinkError
from kronos_connectors.mqtt.options import MqttOptions
from kronos_stream.checkup import Check, Finding

NOT_RETAINED = "it retains no messages, so nobody could have the latest forecasts"

_MORE_SECONDS = 5.0
"""Than connecting may take: for hanging up."""

_AWAY = "see KRONOS_STREAM_MQTT__URL, whether a broker listens there, and whether it is encrypted"


def checks(options: MqttOptions) -> Sequence[Check]:
    """Whether the broker lets us in, what it takes, and whether it retains it."""
    return [Check("mqtt", partial(_look, options), options.connect_seconds + _MORE_SECONDS)]


async def _look(options: MqttOptions) -> Sequence[Finding]:
    # Under a name of its own: of two clients with one name a broker throws out the first.
    link = Link(options, f"{options.client_id}-doctor-{uuid4().hex[:8]}")
    try:
        await link.open()
    except LinkError as error:
        said = f"{options.address}: {error}"
        return [Finding("fail", said, "" if error.refused or error.answer.failed else _AWAY)]
    finally:
        await link.close()
    if not link.retains:
        return [Finding("fail", f"{options.address}: {NOT_RETAINED}", "have it retain messages")]
    found = f"{link.most_bytes:,} bytes a message, {link.window} messages at once"
    findings = [Finding("ok", f"{options.address} lets us in; {found}")]
    if options.username and not options.encrypted and tls.readable(options.host):
        cure = "use mqtts:// in KRONOS_STREAM_MQTT__URL"
        findings.append(
            Finding("warn", "the password is sent as it is, to be read on its way", cure)
        )
    return findings
