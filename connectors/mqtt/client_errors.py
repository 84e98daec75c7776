"""Why a connection cannot be made, where the broker does not say so in MQTT's own words."""

from __future__ import annotations

import logging

from kronos_connectors._shared import tls
from kronos_connectors._shared.tls import ConnectionProblem
from kronos_connectors.mqtt.options import SETTING_NAMES, MqttOptions

CONNECTION_CLOSED = "it hung up at once; is it MQTT, and encrypted if the URL says so?"


class PahoErrorCapture(logging.Handler):
    """What paho logs on one link: nobody is told, but some errors it names there alone."""

    def __init__(self) -> None:
        super().__init__()
        self.logger = logging.Logger("paho")  # noqa: LOG001 - of this link, and no other hears it
        self.logger.addHandler(self)
        self._error: BaseException | None = None

    def emit(self, record: logging.LogRecord) -> None:
        for one in record.args if isinstance(record.args, tuple) else ():
            if isinstance(one, BaseException):
                self._error = one

    def explain(self, error: BaseException, options: MqttOptions) -> ConnectionProblem | None:
        """What keeps us from a connection, by ``error`` and what was heard; None if unknown."""
        for one in (error, self._error):
            if one is None:
                continue
            if found := tls.explain(one, SETTING_NAMES, options.tls_cafile, options.tls_certfile):
                return found
            if any(isinstance(origin, ConnectionResetError) for origin in tls.exception_chain(one)):
                asks = f"it may ask for a certificate of ours: {SETTING_NAMES.certfile}"
                return ConnectionProblem(
                    CONNECTION_CLOSED,
                    asks if options.encrypted and not options.tls_certfile else "",
                )
        return None
