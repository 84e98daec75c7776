"""What aiokafka says while it works: kept from the log, and asked when something fails."""

from __future__ import annotations

import logging

_CONNECTING = ("Unable connect to", "Unable to request metadata from")
_SENDING = "Got error produce response"
"""How those begin that tell why something failed; the error is their last argument."""


class ErrorCapture(logging.Handler):
    """aiokafka's messages: those that tell why it could not connect or send."""

    def __init__(self) -> None:
        super().__init__()
        self.errors: dict[str, BaseException] = {}
        """By broker, or empty: what happened last."""

    def emit(self, record: logging.LogRecord) -> None:
        text, given = str(record.msg), record.args
        if not isinstance(given, tuple) or not text.startswith((*_CONNECTING, _SENDING)):
            return
        *where, error = given
        broker = ":".join(map(str, where)) if text.startswith(_CONNECTING) else ""
        broker = f"broker {broker}" if "node" in text else broker
        if isinstance(error, type):  # some it gives without an instance
            error = error()
        if isinstance(error, BaseException):
            self.errors.pop(broker, None)
            self.errors[broker] = error

    def clear(self) -> None:
        """What is said from now on is about something else."""
        self.errors.clear()


def capture_aiokafka_errors() -> ErrorCapture:
    """Take over aiokafka's logger, once: in an outage it speaks many times a second."""
    logger = logging.getLogger("aiokafka")
    for handler in logger.handlers:
        if isinstance(handler, ErrorCapture):
            return handler
    chatter = ErrorCapture()
    logger.addHandler(chatter)
    logger.propagate = False
    return chatter
