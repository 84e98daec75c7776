"""Logs on stderr: structlog's and the libraries', for people or as JSON.

Lines are rendered where they are logged and written by a thread: whoever reads the log may be slow
or stuck, and the daemon must not be. What does not fit the queue is dropped, and counted.
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

# Their everyday life is of no interest; what matters of it, the connectors say.
_QUIET_LOGGERS = ("aiohttp", "aiokafka", "asyncio", "websockets")


def configure(format_: Format, level: Level, stream: TextIO | None = None) -> Callable[[], None]:
    """Log to ``stream``, stderr by default. Returns what ends that; so does the program's end."""
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
    """What stderr writes to, without its buffer.

    A thread that is stuck in writing would keep the buffer's lock, and Python could not end.
    """
    raw = FileIO(os.dup(sys.stderr.fileno()), "w")
    return TextIOWrapper(raw, "utf-8", "backslashreplace", write_through=True)


def _renderers(format_: Format, *, colours: bool) -> list[Processor]:
    if format_ == "console":
        # The other traceback there is shows local variables, passwords among them.
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
    """Takes passwords out, wherever in a line they stand."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


class _QueueHandler(logging.Handler):
    """Hands lines to a thread; never waits for it, except, for a while, at the end."""

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
        except Exception:  # noqa: BLE001 - a value that cannot be shown must not stop the daemon
            self.handleError(record)
            return
        if self._dropped:
            dropped, self._dropped = self._dropped, 0
            _log.warning("log lines dropped", lines=dropped)

    def close(self) -> None:
        """Write what waits, within bounds; Python calls it when it ends."""
        with suppress(Full):
            self._lines.put(None, timeout=_FLUSH_SECONDS)
        self._writer.join(_FLUSH_SECONDS)
        super().close()

    def _write(self) -> None:
        while (line := self._lines.get()) is not None:
            with suppress(OSError, ValueError):  # nobody is left to be told
                self._out.write(line + "\n")
                self._out.flush()
