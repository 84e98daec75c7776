"""What aiokafka says while it works: kept from the log, and asked when something fails."""

from __future__ import annotations

import logging

_TELLING = ("Unable connect", "Unable to request", "Got error")
"""How those begin that tell why something failed."""


class Chatter(logging.Handler):
    """aiokafka's messages; the last that tells why it could not connect or send."""

    last = ""

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if message.startswith(_TELLING):
            self.last = message


def listen() -> Chatter:
    """Take over aiokafka's logger, once: in an outage it speaks many times a second."""
    logger = logging.getLogger("aiokafka")
    for handler in logger.handlers:
        if isinstance(handler, Chatter):
            return handler
    chatter = Chatter()
    logger.addHandler(chatter)
    logger.propagate = False
    return chatter
