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

from kronos_stream.daemon.config.environment import BROKER
from kronos_stream.daemon.config.settings import Settings, SettingsError
from kronos_stream.daemon.inference.pool import WorkerFactory
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
    """The sources of the settings' venues, by venue. Raises SettingsError, ConnectorError."""
    venues = sorted({entry.venue for entry in settings.watchlist()})
    return {
        venue: connector.build(
            venue, _options(settings, name, connector.options), clock, _child_random(random)
        )
        for venue in venues
        for name, connector in [plugins.load_source(venue)]
    }


def build_sinks(settings: Settings, clock: Clock, random: Random | None = None) -> list[Sink]:
    """The settings' sinks. Raises ConnectorError."""
    random = random or Random()
    return [
        connector.build(_options(settings, name, connector.options), clock, _child_random(random))
        for name in settings.sinks
        for connector in [plugins.load_sink(name)]
    ]


def build_feed(settings: Settings, needs: FeedNeeds, clock: Clock, random: Random) -> Feed:
    """What brings role forecast its candles. Raises ConnectorError."""
    feed = plugins.load_feed(BROKER)
    return feed.build(_options(settings, BROKER, feed.options), needs, clock, _child_random(random))


def build_standalone(
    settings: Settings,
    *,
    sinks: Sequence[Sink] | None = None,
    on_results: Callable[[Sequence[ForecastResult]], None] | None = None,
    worker_factory: WorkerFactory | None = None,
) -> StandaloneRole:
    """A daemon on the wall clock.

    sinks: in place of the settings'. watch: told every result once it is durable. worker: makes
    what forecasts, in place of a process.
    """
    clock = SystemClock()
    random = Random()
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
    """What the settings' role is, on the wall clock. worker: as of :func:`build`."""
    if settings.role == "all":
        return build_standalone(settings, worker_factory=worker_factory)
    clock, random = SystemClock(), Random()
    if settings.role == "ingest":
        relay = plugins.load_relay(BROKER)
        options = _options(settings, BROKER, relay.options)
        sink = relay.build(options, settings.candle_timeframes(), clock, _child_random(random))
        sources = build_sources(settings, clock, random)
        return IngestRole(settings, sources, [sink], clock=clock, random=random)
    needs = FeedNeeds(settings.timeframes, settings.lookback)
    reads = build_feed(settings, needs, clock, random)
    sinks = build_sinks(settings, clock, random)
    return ForecastRole(
        settings, reads, sinks, clock=clock, random=random, worker_factory=worker_factory
    )


async def check(settings: Settings) -> str:
    """See whether the venues have what is asked for, and the model loads; what was found.

    Raises SettingsError, WorkerError, SourceError.
    """
    role = build_role(settings)
    if isinstance(role, IngestRole):
        return f"{await role.check()} series to pass on: settings and symbols are fine"
    sinks = ", ".join(settings.sinks)
    if isinstance(role, ForecastRole):
        identity = await role.check()
        made = f"{identity.model} on {identity.device}, to {sinks}"
        return f"forecasts of what the group gives us with {made}: settings and model are fine"
    identity, count = await role.check()
    return (
        f"{count} series to forecast with {identity.model} on {identity.device}, to {sinks}: "
        "settings, symbols and model are fine"
    )


async def serve(daemon: Role) -> None:
    """Run until the data end or SIGTERM or Ctrl-C comes; a second one ends the process at once.

    The service manager, if one started us, is kept informed.
    """
    notifier = Notifier.from_environ(os.environ)
    reporter = StatusReporter(daemon, notifier)
    with _handle_signals(daemon, reporter):
        beside = [
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
            for task in beside:
                task.cancel()
            await asyncio.wait(beside)
            notifier.close()


async def _limit_gc(daemon: Role) -> None:
    """Have Python look for garbage among all there is only now and then; until cancelled.

    With a thousand series that stops everything for a quarter of a second, and left to itself it
    happens every few seconds. What was made for good by the start is not looked at again.
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
    told = False
    reloads: set[asyncio.Task[None]] = set()

    def stop(number: int) -> None:
        nonlocal told
        if told:
            # The state file is consistent at any moment, and the worker ends with us.
            os._exit(_SIGNAL_EXIT_BASE + number)
        told = True
        _log.info("stopping; once more ends at once", signal=signal.Signals(number).name)
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
    """Read the symbols file again; what is wrong with it is logged, and nothing changes."""
    try:
        await daemon.reload()
    except (SettingsError, SourceError) as error:
        _log.error("symbols not changed", why=str(error))
    except Exception:  # noqa: BLE001 - what it was is not known, nor is what is followed
        _log.exception("symbols changed in part; stopping")
        daemon.stop()
    finally:
        reporter.reloaded()


def _options(settings: Settings, name: str, kind: type[Any]) -> Any:  # noqa: ANN401
    return settings.options[name] if name in settings.options else kind()


def _child_random(random: Random) -> Random:
    return Random(random.getrandbits(64))
