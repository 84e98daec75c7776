"""Capture of errors that client libraries log instead of raising them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

_CONNECTING = ("Unable connect to", "Unable to request metadata from")
_SENDING = "Got error produce response"
"""Beginnings of aiokafka's messages whose last argument is the error."""


class ErrorCapture(logging.Handler):
    """Keeps the newest error of each origin from a library's log."""

    def __init__(
        self, extract: Callable[[logging.LogRecord], Iterator[tuple[str, BaseException]]]
    ) -> None:
        """extract: yields errors of a log record with their origin."""
        super().__init__()
        self.errors: dict[str, BaseException] = {}
        """By origin, the newest last."""
        self._extract = extract

    def emit(self, record: logging.LogRecord) -> None:
        for origin, error in self._extract(record):
            self.errors.pop(origin, None)
            self.errors[origin] = error

    def clear(self) -> None:
        """Forget all errors."""
        self.errors.clear()


def capture_aiokafka_errors() -> ErrorCapture:
    """The capture of aiokafka's log, which is not propagated: it is too long in an outage.

    Origins are brokers, or empty.
    """
    logger = logging.getLogger("aiokafka")
    for handler in logger.handlers:
        if isinstance(handler, ErrorCapture):
            return handler
    capture = ErrorCapture(_aiokafka_errors)
    logger.addHandler(capture)
    logger.propagate = False
    return capture


def _aiokafka_errors(record: logging.LogRecord) -> Iterator[tuple[str, BaseException]]:
    text, arguments = str(record.msg), record.args
    if not isinstance(arguments, tuple) or not text.startswith((*_CONNECTING, _SENDING)):
        return
    *place, error = arguments
    broker = ":".join(map(str, place)) if text.startswith(_CONNECTING) else ""
    broker = f"broker {broker}" if "node" in text else broker
    if isinstance(error, type):  # some are passed as a class
        error = error()
    if isinstance(error, BaseException):
        yield broker, error


def capture_paho_errors() -> tuple[logging.Logger, ErrorCapture]:
    """A logger for one client of paho, which nothing else receives, and its capture."""
    logger, capture = logging.Logger("paho"), ErrorCapture(_paho_errors)  # noqa: LOG001
    logger.addHandler(capture)
    return logger, capture


def _paho_errors(record: logging.LogRecord) -> Iterator[tuple[str, BaseException]]:
    for argument in record.args if isinstance(record.args, tuple) else ():
        if isinstance(argument, BaseException):
            yield "", argument
