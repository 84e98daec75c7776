"""Logging to stderr of structlog and of libraries, as readable lines or JSON.

A thread writes the lines, so that a slow or blocked reader of stderr does not block the daemon.
Lines that do not fit into the queue are dropped and counted.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from io import FileIO, TextIOWrapper
from queue import Full, Queue
from threading import Thread
from typing import Any, Literal, TextIO

import orjson
import structlog
from structlog.typing import Processor

from kronos_stream.redaction import redact

Format = Literal["console", "json"]
Level = Literal["debug", "info", "warning", "error"]

_log = structlog.get_logger()

_MAX_QUEUED_LINES = 10_000
_FLUSH_SECONDS = 2.0

# Connectors log what matters of these.
_QUIET_LOGGERS = ("aiohttp", "aiokafka", "asyncio", "websockets")


def configure(format_: Format, level: Level, stream: TextIO | None = None) -> Callable[[], None]:
    """Log to ``stream``, stderr by default. Returns a function that ends it, as does the exit."""
    out = stream or _stderr()
    number = logging.getLevelNamesMapping()[level.upper()]
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="time"),
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.stdlib.LoggerFactory(),
    )
    handler = _QueueHandler(out)
    handler.setFormatter(
        _RedactingFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.add_logger_name],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                *_renderers(format_, colours=out.isatty()),
            ],
        )
    )
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(number)
    logging.captureWarnings(capture=True)
    for name in _QUIET_LOGGERS:
        logging.getLogger(name).setLevel(max(number, logging.WARNING))

    def end() -> None:
        root.removeHandler(handler)
        handler.close()

    return end


def _stderr() -> TextIO:
    """Return an unbuffered writer to stderr.

    A thread that blocks while it writes would hold the lock of a buffer, and Python could not exit.
    """
    raw = FileIO(os.dup(sys.stderr.fileno()), "w")
    return TextIOWrapper(raw, "utf-8", "backslashreplace", write_through=True)


def _renderers(format_: Format, *, colours: bool) -> list[Processor]:
    if format_ == "console":
        # The default traceback shows local variables, which may be passwords.
        formatter = structlog.dev.plain_traceback
        return [
            structlog.dev.ConsoleRenderer(
                colors=colours, timestamp_key="time", exception_formatter=formatter
            )
        ]
    return [
        structlog.processors.format_exc_info,
        structlog.processors.JSONRenderer(serializer=_to_json),
    ]


def _to_json(event: dict[str, Any], **_: Any) -> str:  # noqa: ANN401 - what structlog passes
    return orjson.dumps(event, default=str, option=orjson.OPT_NON_STR_KEYS).decode()


class _RedactingFormatter(structlog.stdlib.ProcessorFormatter):
    """Masks secrets in whole lines."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


class _QueueHandler(logging.Handler):
    """Passes lines to a thread; waits for it only in :meth:`close`, and for a limited time."""

    def __init__(self, out: TextIO) -> None:
        super().__init__()
        self._out = out
        self._lines: Queue[str | None] = Queue(_MAX_QUEUED_LINES)
        self._dropped = 0
        self._writer = Thread(target=self._write, name="log", daemon=True)
        self._writer.start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._lines.put_nowait(self.format(record))
        except Full:
            self._dropped += 1
            return
        except Exception:  # noqa: BLE001 - a value without representation must not end the daemon
            self.handleError(record)
            return
        if self._dropped:
            dropped, self._dropped = self._dropped, 0
            _log.warning("log lines dropped", lines=dropped)

    def close(self) -> None:
        """Write the queued lines within a time limit. Python calls it on exit."""
        with suppress(Full):
            self._lines.put(None, timeout=_FLUSH_SECONDS)
        self._writer.join(_FLUSH_SECONDS)
        super().close()

    def _write(self) -> None:
        while (line := self._lines.get()) is not None:
            with suppress(OSError, ValueError):  # nothing can be reported any more
                self._out.write(line + "\n")
                self._out.flush()
