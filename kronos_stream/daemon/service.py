"""The daemon as a process: built from settings, stopped and reloaded by signals."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from random import Random
from typing import Any

import structlog

from kronos_stream.daemon.config.settings import Settings, SettingsError
from kronos_stream.daemon.inference.backend import WorkerFactory
from kronos_stream.daemon.requests import ForecastResult
from kronos_stream.daemon.roles.base import Role
from kronos_stream.daemon.roles.forecast import ForecastRole
from kronos_stream.daemon.roles.ingest import IngestRole
from kronos_stream.daemon.roles.standalone import StandaloneRole
from kronos_stream.daemon.status.sd_notify import Notifier
from kronos_stream.daemon.status.systemd import StatusReporter
from kronos_stream.interfaces import plugins
from kronos_stream.interfaces.feed import Feed, FeedNeeds
from kronos_stream.interfaces.sink import Sink
from kronos_stream.interfaces.source import Source, SourceError
from kronos_stream.market.clock import Clock, SystemClock

_log = structlog.get_logger()

_SIGNAL_EXIT_BASE = 128

_GC_SECONDS = 600.0
_GC_NEVER = 2**31 - 1


def build_sources(settings: Settings, clock: Clock, random: Random) -> dict[str, Source]:
    """Build the source of each configured venue. Raises SettingsError, ConnectorError."""
    venues = sorted({entry.venue for entry in settings.watchlist()})
    return {
        venue: connector.build(
            venue, _options(settings, name, connector.options), clock, _child_random(random)
        )
        for venue in venues
        for name, connector in [plugins.load_source(venue)]
    }


def build_sinks(settings: Settings, clock: Clock, random: Random | None = None) -> list[Sink]:
    """Build the configured sinks. Raises ConnectorError."""
    random = random or Random()
    return [
        connector.build(_options(settings, name, connector.options), clock, _child_random(random))
        for name in settings.sinks
        for connector in [plugins.load_sink(name)]
    ]


def build_feed(settings: Settings, needs: FeedNeeds, clock: Clock, random: Random) -> Feed:
    """Build the reader of the candle topics. Raises ConnectorError."""
    name, feed = plugins.load_feed()
    return feed.build(_options(settings, name, feed.options), needs, clock, _child_random(random))


def build_standalone(
    settings: Settings,
    *,
    sinks: Sequence[Sink] | None = None,
    on_results: Callable[[Sequence[ForecastResult]], None] | None = None,
    worker_factory: WorkerFactory | None = None,
) -> StandaloneRole:
    """Build a daemon of role ``all``.

    sinks: in place of those of the settings. The rest is as for :class:`StandaloneRole`.
    """
    clock, random = SystemClock(), Random()
    return StandaloneRole(
        settings,
        build_sources(settings, clock, random),
        build_sinks(settings, clock, random) if sinks is None else sinks,
        clock=clock,
        random=random,
        on_results=on_results,
        worker_factory=worker_factory,
    )


def build_role(
    settings: Settings, *, worker_factory: WorkerFactory | None = None
) -> StandaloneRole | IngestRole | ForecastRole:
    """Build the daemon of the role in the settings. Raises SettingsError, ConnectorError."""
    if settings.role == "all":
        return build_standalone(settings, worker_factory=worker_factory)
    clock, random = SystemClock(), Random()
    if settings.role == "ingest":
        name, relay = plugins.load_relay()
        options = _options(settings, name, relay.options)
        sink = relay.build(options, settings.candle_timeframes(), clock, _child_random(random))
        sources = build_sources(settings, clock, random)
        return IngestRole(settings, sources, [sink], clock=clock, random=random)
    needs = FeedNeeds(settings.timeframes, settings.lookback)
    return ForecastRole(
        settings,
        build_feed(settings, needs, clock, random),
        build_sinks(settings, clock, random),
        clock=clock,
        random=random,
        worker_factory=worker_factory,
    )


async def serve(daemon: Role) -> None:
    """Run until the data end or SIGTERM or SIGINT; a second signal ends the process at once.

    SIGHUP reads the symbols file again. systemd is notified if it started the process.
    """
    notifier = Notifier.from_environ(os.environ)
    reporter = StatusReporter(daemon, notifier)
    with _handle_signals(daemon, reporter):
        helpers = [
            asyncio.create_task(_limit_gc(daemon)),
            asyncio.create_task(reporter.run()),
        ]
        failure = ""
        try:
            await daemon.run()
        except Exception as error:
            failure = str(error) or repr(error)
            raise
        finally:
            reporter.stopping(failure)
            for task in helpers:
                task.cancel()
            await asyncio.wait(helpers)
            notifier.close()


async def _limit_gc(daemon: Role) -> None:
    """Run full garbage collections at long intervals only, until cancelled.

    With a thousand series, one takes a quarter of a second and by default runs every few seconds.
    Objects made during the start are excluded for good.
    """
    await daemon.ready.wait()
    young, middle, old = gc.get_threshold()
    gc.collect()
    gc.freeze()
    try:
        gc.set_threshold(young, middle, _GC_NEVER)
        while True:
            await asyncio.sleep(_GC_SECONDS)
            gc.collect()
    finally:
        gc.set_threshold(young, middle, old)
        gc.unfreeze()


@contextmanager
def _handle_signals(daemon: Role, reporter: StatusReporter) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    stopping = False
    reloads: set[asyncio.Task[None]] = set()

    def stop(number: int) -> None:
        nonlocal stopping
        if stopping:
            # The state file is consistent at any moment, and the worker ends with this process.
            os._exit(_SIGNAL_EXIT_BASE + number)
        stopping = True
        _log.info("stopping; a second signal ends at once", signal=signal.Signals(number).name)
        reporter.stopping()
        daemon.stop()

    def reload() -> None:
        reporter.reloading()
        task = loop.create_task(_reload(daemon, reporter))
        reloads.add(task)
        task.add_done_callback(reloads.discard)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop, number)
    loop.add_signal_handler(signal.SIGHUP, reload)
    try:
        yield
    finally:
        for task in reloads:
            task.cancel()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.remove_signal_handler(number)


async def _reload(daemon: Role, reporter: StatusReporter) -> None:
    """Read the symbols file again; an invalid file is logged and changes nothing."""
    try:
        await daemon.reload()
    except (SettingsError, SourceError) as error:
        _log.error("symbols not changed", why=str(error))
    except Exception:  # noqa: BLE001 - the followed series are unknown now
        _log.exception("symbols partly changed; stopping")
        daemon.stop()
    finally:
        reporter.reloaded()


def _options(settings: Settings, name: str, kind: type[Any]) -> Any:  # noqa: ANN401
    return settings.options[name] if name in settings.options else kind()


def _child_random(random: Random) -> Random:
    return Random(random.getrandbits(64))
