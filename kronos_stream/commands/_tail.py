"""Implementation of ``kronos-stream tail``: forecasts from Kafka as a live table or as lines."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, Protocol

import click
from aiokafka.errors import KafkaError, UnknownTopicOrPartitionError
from pydantic import ValidationError
from rich.console import Console
from rich.live import Live

from kronos_connectors._shared.client_errors import capture_aiokafka_errors
from kronos_connectors._shared.tls import ConnectionProblem
from kronos_connectors.kafka.errors import ADDRESS_REMEDY, explain, explain_captured
from kronos_connectors.kafka.options import KafkaOptions
from kronos_connectors.kafka.topics import forecast_topic
from kronos_stream.client import Forecast, forecasts
from kronos_stream.commands._forecast_table import ForecastTable, format_line
from kronos_stream.daemon.config.environment import read_options, validation_reason
from kronos_stream.market.clock import SystemClock
from kronos_stream.market.series import Series

_FRAME_SECONDS = 0.5
_WAITING_NOTICE_SECONDS = 10.0
_ARGUMENT_REMEDY = "check the address, and that a broker listens there"
_REQUEST_TIMEOUT_MS = 15_000
"""Time after which a topic that does not appear is reported as missing."""
_INITIAL_LOOKBACK = timedelta(minutes=2)
"""The table starts with recent forecasts, so that it is not empty until the next bar closes."""


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
    """A row per series; redrawn also without new forecasts, because ages grow."""

    def __init__(self, table: ForecastTable, live: Live) -> None:
        self._table, self._live, self._clock = table, live, SystemClock()
        self.add = table.add

    def refresh(self) -> None:
        console = self._live.console
        table = self._table.render(self._clock.now(), console.width, console.height)
        self._live.update(table, refresh=True)


def run(
    bootstrap: str | None,
    *,
    series: tuple[str, ...],
    prefix: str | None,
    from_start: bool,
    newest: bool,
    plain: bool,
    as_json: bool,
) -> None:
    """Show forecasts until interrupted. Raises click's exceptions and SettingsError."""
    kafka = _kafka_options(bootstrap, prefix, series)
    remedy = ADDRESS_REMEDY if bootstrap is None else _ARGUMENT_REMEDY
    console = Console()
    lines = plain or as_json or not console.is_terminal
    start: Literal["latest", "earliest"] | datetime
    start = "latest" if lines else datetime.now(UTC) - _INITIAL_LOOKBACK
    connection = kafka.client_arguments()
    stream = forecasts(
        connection.pop("bootstrap_servers"),
        series=series or None,
        topic_prefix=kafka.topic_prefix,
        start="earliest" if from_start else start,
        expired=from_start or not lines,
        request_timeout_ms=_REQUEST_TIMEOUT_MS,
        **connection,
    )
    if lines:
        click.echo(f"Reading {_topic_label(kafka)}; Ctrl-C ends", err=True)
        display = _LineDisplay(as_json=as_json)
        _run_until_interrupted(_show(stream, display, kafka, series, remedy), kafka, remedy)
        return
    with Live(console=console, auto_refresh=False) as live:
        table = ForecastTable(_topic_label(kafka), newest_first=newest)
        live_display = _TableDisplay(table, live)
        _run_until_interrupted(_show(stream, live_display, kafka, series, remedy), kafka, remedy)


def _kafka_options(
    bootstrap: str | None, prefix: str | None, series: Sequence[str]
) -> KafkaOptions:
    """The daemon's Kafka options, unless given here; checks the names of ``series``, too."""
    try:
        for name in series:
            Series.parse(name)
        if bootstrap is None:
            kafka: KafkaOptions = read_options("kafka", os.environ)
        else:
            kafka = KafkaOptions(bootstrap_servers=bootstrap)
        if prefix is not None:
            kafka = KafkaOptions(**{**dict(kafka), "topic_prefix": prefix})
    except ValidationError as error:
        raise click.UsageError(validation_reason(error.errors()[0])) from None
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    return kafka


async def _show(
    stream: AsyncGenerator[Forecast, None],
    display: _Display,
    kafka: KafkaOptions,
    series: Sequence[str],
    address_remedy: str,
) -> None:
    """Show forecasts as they arrive; print a notice, once, if none does."""
    captured = capture_aiokafka_errors()
    loop = asyncio.get_running_loop()
    notice_due: float | None = loop.time() + _WAITING_NOTICE_SECONDS
    async with aclosing(stream):
        coming = asyncio.ensure_future(anext(stream))
        try:
            while True:
                await asyncio.wait((coming,), timeout=_FRAME_SECONDS)
                if coming.done():
                    notice_due = None
                    display.add(coming.result())
                    coming = asyncio.ensure_future(anext(stream))
                elif notice_due is not None and loop.time() > notice_due:
                    notice_due = None
                    problem = explain_captured(captured, kafka)
                    if problem is not None:
                        problem = _with_address_remedy(problem, address_remedy)
                    click.echo(_waiting_notice(kafka, series, problem), err=True)
                display.refresh()
        finally:
            coming.cancel()
            await asyncio.wait((coming,))


def _waiting_notice(
    kafka: KafkaOptions, series: Sequence[str], problem: ConnectionProblem | None
) -> str:
    forecast = f"No forecast of {', '.join(series)}" if series else "No forecast"
    return f"{forecast} for {_WAITING_NOTICE_SECONDS:g} s; still reading {_topic_label(kafka)}" + (
        f" ({problem})" if problem else "; is a daemon publishing to it?"
    )


def _topic_label(kafka: KafkaOptions) -> str:
    return f"{forecast_topic(kafka.topic_prefix)} at {kafka.bootstrap_servers}"


def _with_address_remedy(problem: ConnectionProblem, remedy: str) -> ConnectionProblem:
    """Replace the remedy that names the setting of the address, which an argument may override."""
    return problem._replace(remedy=remedy) if problem.remedy == ADDRESS_REMEDY else problem


def _run_until_interrupted(
    work: Coroutine[Any, Any, None], kafka: KafkaOptions, address_remedy: str
) -> None:
    try:
        asyncio.run(work)
    except UnknownTopicOrPartitionError:
        raise click.ClickException(
            f"no topic {_topic_label(kafka)}, or no right to see it; "
            "to create it: kronos-stream topics create"
        ) from None
    except KafkaError as error:
        problem = explain(error, capture_aiokafka_errors(), kafka)
        raise click.ClickException(str(_with_address_remedy(problem, address_remedy))) from error
