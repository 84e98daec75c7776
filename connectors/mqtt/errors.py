"""Explanations of connection failures that the broker did not explain by a reason code."""

from __future__ import annotations

from kronos_connectors._shared.client_errors import ErrorCapture
from kronos_connectors._shared.tls import ConnectionProblem, exception_chain
from kronos_connectors.mqtt.options import SETTING_NAMES, MqttOptions

CONNECTION_CLOSED = (
    "the broker closed the connection at once; is it MQTT, and encrypted if the URL says so?"
)


def explain(
    error: BaseException, captured: ErrorCapture, options: MqttOptions
) -> ConnectionProblem | None:
    """Explain why a connection failed; None if neither ``error`` nor paho's log shows the cause."""
    for one in (error, *captured.errors.values()):
        if found := options.tls_files.explain(one):
            return found
        if any(isinstance(cause, ConnectionResetError) for cause in exception_chain(one)):
            remedy = f"it may require a client certificate: {SETTING_NAMES.certfile}"
            return ConnectionProblem(
                CONNECTION_CLOSED, remedy if options.encrypted and not options.tls_certfile else ""
            )
    return None
