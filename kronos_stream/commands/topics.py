"""``kronos-stream topics``: create the Kafka topics, or say what is wrong with them."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any

import click

from kronos_stream.market.timeframe import Timeframe

if TYPE_CHECKING:
    from kronos_connectors.kafka.options import KafkaOptions
    from kronos_connectors.kafka.topics import TopicSpec

_PROBLEMS_EXIT_CODE = 2


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def topics() -> None:
    """Create and check the Kafka topics that the daemon writes to.

    Where and as whom is set as for the daemon: KRONOS_STREAM_KAFKA__BOOTSTRAP_SERVERS,
    KRONOS_STREAM_KAFKA__TOPIC_PREFIX and so on.
    """


_CANDLES = click.option(
    "--candles",
    "timeframes",
    metavar="1m,5m,...",
    default="",
    help="Also the topics of candles in these timeframes. Where KRONOS_STREAM_ROLE is ingest or "
    "forecast, those that it needs, unless told.",
)


@topics.command()
@_CANDLES
def create(timeframes: str) -> None:
    """Create the topics that are missing; leave the others as they are."""
    from kronos_connectors.kafka import admin

    options, wanted = _required_topics(timeframes)
    for line in _run(admin.create(options, wanted)):
        click.echo(line)
    _exit_on_problems(_run(admin.check(options, wanted)))


@topics.command()
@_CANDLES
def check(timeframes: str) -> None:
    """Check the topics; exit code 2 and a line for each that will not do."""
    from kronos_connectors.kafka import admin

    options, wanted = _required_topics(timeframes)
    _exit_on_problems(_run(admin.check(options, wanted)))
    click.echo(f"{len(wanted)} topics are as they should be")


def _required_topics(timeframes: str) -> tuple[KafkaOptions, list[TopicSpec]]:
    from kronos_connectors.kafka.topics import required_topics
    from kronos_stream.daemon.config.environment import candle_timeframes, read_options

    try:
        parsed = [Timeframe.parse(text) for text in timeframes.split(",") if text]
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    options = read_options("kafka", os.environ)
    return options, required_topics(options, parsed or candle_timeframes(os.environ))


def _run(work: Coroutine[Any, Any, list[str]]) -> list[str]:
    from kronos_connectors.kafka.admin import TopicsError

    try:
        return asyncio.run(work)
    except TopicsError as error:
        raise click.ClickException(str(error)) from error


def _exit_on_problems(problems: list[str]) -> None:
    """Say what is wrong, if anything is, and leave."""
    for line in problems:
        click.echo(line, err=True)
    if problems:
        click.get_current_context().exit(_PROBLEMS_EXIT_CODE)
