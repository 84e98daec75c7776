"""Checks of all that a daemon with given settings depends on.

Connectors provide the checks of venues and brokers (:mod:`kronos_stream.interfaces.diagnostics`).
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial
from random import Random
from typing import Any

from kronos_stream.daemon.config.environment import redacted_variables
from kronos_stream.daemon.config.settings import ENV_PREFIX, Settings, SettingsError
from kronos_stream.daemon.doctor import host_checks
from kronos_stream.daemon.intake.universe import resolve
from kronos_stream.daemon.service import build_feed, build_sinks, build_sources
from kronos_stream.interfaces.diagnostics import (
    Check,
    CheckedFeed,
    CheckedSink,
    CheckedSource,
    Finding,
    Result,
    run_checks,
)
from kronos_stream.interfaces.feed import FeedNeeds
from kronos_stream.interfaces.sink import Sink
from kronos_stream.interfaces.source import LoginRefused, Source, SourceError, VenueRefused
from kronos_stream.market.clock import SystemClock
from kronos_stream.market.series import Series

_INTERRUPTED = 130
"""Exit code after Ctrl-C, as of a shell."""
_MODEL_SECONDS = 900.0
"""It may have to be downloaded."""
_SYMBOLS_SECONDS = 90.0
"""A venue's list of symbols has megabytes."""


def run_until_interrupted(main: Coroutine[Any, Any, None]) -> None:
    """Run ``main``. On Ctrl-C, cancel it and then exit without waiting for threads.

    A thread may be blocked for long, for example in a DNS lookup.
    """
    with asyncio.Runner() as runner:
        try:
            runner.run(main)
        except KeyboardInterrupt:
            sys.stdout.flush()
            os._exit(_INTERRUPTED)


def environment_finding(environ: Mapping[str, str]) -> Finding:
    """List the variables that are set, with secrets masked. Raises SettingsError."""
    variables = sorted(redacted_variables(environ).items())
    text = ", ".join(f"{name.removeprefix(ENV_PREFIX)}={value}" for name, value in variables)
    return Finding("ok", text or "nothing is set")


class Doctor:
    """Runs the checks for ``settings``; it sends no record and changes nothing."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        follows = settings.role != "forecast"
        self._series: set[Series] = set(settings.series() if follows else ())
        """Series to follow, as far as they are known."""

    async def examine(
        self, on_start: Callable[[str], None], skip: Collection[str] = ()
    ) -> AsyncIterator[Result]:
        """Yield each result when its check is done.

        on_start: called with the name of each check that starts. skip: areas of :data:`AREAS`.
        """
        async with AsyncExitStack() as stack:
            for area in AREAS:
                if area not in skip:
                    async for result in run_checks(self._area_checks(area, stack), on_start):
                        yield result

    def _area_checks(self, area: str, stack: AsyncExitStack) -> Sequence[Check]:
        settings = self._settings
        state = None if settings.role == "forecast" else settings.state_file
        checks_of: dict[str, Callable[[], Sequence[Check]]] = {
            "state": lambda: [
                Check("state file", partial(host_checks.check_state_file, settings.state_file))
            ],
            "http": lambda: [
                Check("http port", partial(host_checks.check_port, settings.http, state))
            ],
            "venues": lambda: self._source_checks(stack),
            "sinks": lambda: self._sink_checks(stack),
            "model": lambda: [
                Check("model", partial(self._check_model, number), _MODEL_SECONDS)
                for number in range(len(settings.devices))
            ],
        }
        if settings.role == "forecast":
            checks_of["state"] = tuple
            checks_of["venues"] = lambda: self._feed_checks(stack, writes=False)
        elif settings.role == "ingest":
            checks_of["sinks"] = lambda: self._feed_checks(stack, writes=True)
            checks_of["model"] = tuple
        return checks_of[area]()

    def _source_checks(self, stack: AsyncExitStack) -> Sequence[Check]:
        try:
            sources = build_sources(self._settings, SystemClock(), Random())
        except (SettingsError, SourceError) as error:
            return [
                Check("venues", partial(_constant, Finding("fail", str(error), _SYMBOL_REMEDY)))
            ]
        found: list[Check] = []
        for venue, source in sources.items():
            stack.push_async_callback(source.close)
            # The series of a pattern are not known yet; these name its markets and timeframes.
            entries = [one for one in self._settings.watchlist() if one.venue == venue]
            series = [one for entry in entries for one in entry.series()]
            if isinstance(source, CheckedSource):
                found += [_with_remedy(check) for check in source.checks(series)]
            symbols = partial(self._check_symbols, venue, source)
            found.append(_with_remedy(Check(f"{venue} symbols", symbols, _SYMBOLS_SECONDS)))
        return found

    async def _check_symbols(self, venue: str, source: Source) -> Sequence[Finding]:
        """Check that the venue has all symbols of the watchlist."""
        entries = [one for one in self._settings.watchlist() if one.venue == venue]
        try:
            series = await resolve(entries, {venue: source}, ())
        except SettingsError as error:
            return [Finding("fail", problem, _SYMBOL_REMEDY) for problem in error.problems]
        self._series |= series
        unknown = await source.unsupported(series)
        self._series -= unknown.keys()
        if unknown:
            return [
                Finding("fail", f"{name}: {reason}", _SYMBOL_REMEDY)
                for name, reason in unknown.items()
            ]
        return [Finding("ok", f"{venue} has all {len(series)} series")]

    def _sink_checks(self, stack: AsyncExitStack) -> Sequence[Check]:
        found: list[Check] = []
        for sink in build_sinks(self._settings, SystemClock()):
            stack.push_async_callback(sink.close)
            if isinstance(sink, CheckedSink):
                found += sink.checks()
            else:
                found.append(Check(sink.name, partial(_no_checks, sink)))
        return found

    def _feed_checks(self, stack: AsyncExitStack, *, writes: bool) -> Sequence[Check]:
        settings = self._settings
        needs = FeedNeeds(settings.candle_timeframes(), settings.lookback)
        feed = build_feed(settings, needs, SystemClock(), Random())
        stack.push_async_callback(feed.close)
        return feed.checks(writes=writes) if isinstance(feed, CheckedFeed) else ()

    async def _check_model(self, number: int) -> Sequence[Finding]:
        """Check one device with its share of the series."""
        devices = self._settings.devices
        config = replace(self._settings.forecast_config(), device=devices[number])
        return await host_checks.check_model(config, sorted(self._series)[number :: len(devices)])


AREAS = ("state", "http", "venues", "sinks", "model")
"""Areas in the order of their checks, quick ones first."""

_SYMBOL_REMEDY = (
    "see KRONOS_STREAM_SYMBOLS, KRONOS_STREAM_SYMBOLS_FILE and KRONOS_STREAM_TIMEFRAMES"
)


def _with_remedy(check: Check) -> Check:
    """Add a remedy to errors of a venue that have none of their own."""

    async def run() -> Sequence[Finding]:
        try:
            return await check.run()
        except VenueRefused as error:
            remedy = "it does not serve this address: use another one, or leave the venue out"
            return [Finding("fail", str(error), remedy)]
        except SourceError as error:
            general = "check that this machine reaches it: network, firewall, the venue's URLs"
            specific = error.has_remedy or isinstance(error, LoginRefused)
            remedy = "" if specific else general
            return [Finding("fail", str(error), remedy)]

    return check._replace(run=run)


async def _constant(finding: Finding) -> Sequence[Finding]:
    return [finding]


async def _no_checks(sink: Sink) -> Sequence[Finding]:
    found = f"not checked: the sink {sink.name} has no checks"
    return [Finding("warn", found, "/readyz of kronos-stream run reports whether it delivers")]
