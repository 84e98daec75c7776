"""Forecasts from Kafka on the terminal, or as lines, until Ctrl-C."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, Protocol, TypeAlias

import click
from aiokafka.errors import KafkaError, UnknownTopicOrPartitionError
from pydantic import ValidationError
from rich.console import Console
from rich.live import Live

from kronos_connectors._shared.client_errors import capture_aiokafka_errors
from kronos_connectors._shared.tls import ConnectionProblem
from kronos_connectors.kafka.errors import explain, explain_captured
from kronos_connectors.kafka.options import KafkaOptions
from kronos_connectors.kafka.topics import forecast_topic as topic_of
from kronos_stream.client import Forecast, forecasts
from kronos_stream.commands._forecast_table import ForecastTable, format_line
from kronos_stream.daemon.config.environment import read_options
from kronos_stream.market.clock import SystemClock
from kronos_stream.market.series import Series

Start: TypeAlias = Literal["latest", "earliest"] | datetime

_FRAME_SECONDS = 0.5
_WAITING_NOTICE_SECONDS = 10.0
_REQUEST_TIMEOUT_MS = 15_000
"""After so long a topic that is not there is said to be missing."""
_INITIAL_LOOKBACK = timedelta(minutes=2)
"""A table begins with what was published lately, so that it is not empty for a whole bar."""


@dataclass(frozen=True, slots=True)
class Options:
    """What the command was told."""

    bootstrap: str | None
    series: tuple[str, ...]
    prefix: str | None
    from_start: bool
    newest: bool
    plain: bool
    as_json: bool


class _Display(Protocol):
    def add(self, forecast: Forecast) -> None: ...

    def refresh(self) -> None: ...


class _LineDisplay:
    """A line per forecast."""

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json

    def add(self, forecast: Forecast) -> None:
        click.echo(forecast.encode().decode() if self._as_json else format_line(forecast))

    def refresh(self) -> None:
        pass


class _TableDisplay:
    """A row per series, drawn anew now and then: ages grow even if nothing comes."""

    def __init__(self, board: ForecastTable, live: Live) -> None:
        self._table, self._live, self._clock = board, live, SystemClock()
        self.add = board.add

    def refresh(self) -> None:
        console = self._live.console
        table = self._table.render(self._clock.now(), console.width, console.height)
        self._live.update(table, refresh=True)


def run(options: Options) -> None:
    """Show until interrupted. Raises click's exceptions and SettingsError."""
    kafka = _kafka_options(options)
    topic = _topic_label(kafka)
    console = Console()
    if options.plain or options.as_json or not console.is_terminal:
        click.echo(f"Reading {topic}; Ctrl-C ends", err=True)
        start: Start = "earliest" if options.from_start else "latest"
        stream = _stream(options, kafka, start, expired=options.from_start)
        _run_until_interrupted(
            _show(stream, _LineDisplay(as_json=options.as_json), kafka, options.series), kafka
        )
        return
    start = "earliest" if options.from_start else datetime.now(UTC) - _INITIAL_LOOKBACK
    stream = _stream(options, kafka, start, expired=True)
    with Live(console=console, auto_refresh=False) as live:
        screen = _TableDisplay(ForecastTable(topic, newest_first=options.newest), live)
        _run_until_interrupted(_show(stream, screen, kafka, options.series), kafka)


def _kafka_options(options: Options) -> KafkaOptions:
    """Where and as whom to read."""
    for name in options.series:
        try:
            Series.parse(name)
        except ValueError as error:
            raise click.UsageError(str(error)) from None
    try:
        if options.bootstrap is None:
            kafka: KafkaOptions = read_options("kafka", os.environ)
        else:
            kafka = KafkaOptions(bootstrap_servers=options.bootstrap)
        if options.prefix is not None:
            kafka = KafkaOptions(**{**dict(kafka), "topic_prefix": options.prefix})
    except ValidationError as error:
        raise click.UsageError(error.errors()[0]["msg"]) from None
    return kafka


def _stream(
    options: Options, kafka: KafkaOptions, start: Start, *, expired: bool
) -> AsyncGenerator[Forecast, None]:
    connection = kafka.client_arguments()
    return forecasts(
        connection.pop("bootstrap_servers"),
        series=options.series or None,
        topic_prefix=kafka.topic_prefix,
        start=start,
        expired=expired,
        request_timeout_ms=_REQUEST_TIMEOUT_MS,
        **connection,
    )


async def _show(
    stream: AsyncGenerator[Forecast, None],
    screen: _Display,
    kafka: KafkaOptions,
    series: Sequence[str],
) -> None:
    """Show what comes; say so, once, if nothing does."""
    chatter = capture_aiokafka_errors()
    loop = asyncio.get_running_loop()
    waiting_since: float | None = loop.time()
    async with aclosing(stream):
        coming = asyncio.ensure_future(anext(stream))
        try:
            while True:
                await asyncio.wait((coming,), timeout=_FRAME_SECONDS)
                if coming.done():
                    waiting_since = None
                    screen.add(coming.result())
                    coming = asyncio.ensure_future(anext(stream))
                elif (
                    waiting_since is not None
                    and loop.time() - waiting_since > _WAITING_NOTICE_SECONDS
                ):
                    waiting_since = None
                    click.echo(
                        _waiting_notice(kafka, series, explain_captured(chatter, kafka)), err=True
                    )
                screen.refresh()
        finally:
            coming.cancel()
            await asyncio.wait((coming,))


def _waiting_notice(
    kafka: KafkaOptions, series: Sequence[str], trouble: ConnectionProblem | None
) -> str:
    of = f" of {', '.join(series)}" if series else ""
    return (
        f"No forecast{of} for {_WAITING_NOTICE_SECONDS:g} s; still waiting for {_topic_label(kafka)}"
        + (f" ({trouble})" if trouble else ": does a daemon publish there?")
    )


def _topic_label(kafka: KafkaOptions) -> str:
    return f"{topic_of(kafka.topic_prefix)} at {kafka.bootstrap_servers}"


def _run_until_interrupted(work: Coroutine[Any, Any, None], kafka: KafkaOptions) -> None:
    try:
        asyncio.run(work)
    except UnknownTopicOrPartitionError:
        raise click.ClickException(
            f"no topic {_topic_label(kafka)}, or no right to see it; "
            "to create it: kronos-stream topics create"
        ) from None
    except KafkaError as error:
        raise click.ClickException(str(explain(error, capture_aiokafka_errors(), kafka))) from error
