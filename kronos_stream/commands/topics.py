"""``kronos-stream topics``: create and check the Kafka topics."""

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

    Brokers, login and topic prefix are the daemon's settings:
    KRONOS_STREAM_KAFKA__BOOTSTRAP_SERVERS, KRONOS_STREAM_KAFKA__TOPIC_PREFIX and so on.
    """


_CANDLES = click.option(
    "--candles",
    "timeframes",
    metavar="1m,5m,...",
    default="",
    help="Include candle topics of these timeframes. By default, those that KRONOS_STREAM_ROLE "
    "ingest or forecast needs.",
)


@topics.command()
@_CANDLES
def create(timeframes: str) -> None:
    """Create missing topics. Existing ones are not changed."""
    from kronos_connectors.kafka import admin

    options, topics = _required_topics(timeframes)
    for line in _run(admin.create(options, topics)):
        click.echo(line)
    _exit_on_problems(_run(admin.check(options, topics)))


@topics.command()
@_CANDLES
def check(timeframes: str) -> None:
    """Check the topics. Prints a line per problem; exit code 2 if there is one."""
    from kronos_connectors.kafka import admin

    options, topics = _required_topics(timeframes)
    _exit_on_problems(_run(admin.check(options, topics)))
    click.echo(f"{len(topics)} topics are as they should be")


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
    """Print problems to stderr and exit, if there are any."""
    for line in problems:
        click.echo(line, err=True)
    if problems:
        click.get_current_context().exit(_PROBLEMS_EXIT_CODE)
