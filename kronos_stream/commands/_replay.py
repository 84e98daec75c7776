"""Implementation of ``kronos-stream replay``: the daemon on recorded candles, and its figures."""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from math import isinf
from pathlib import Path
from random import Random
from typing import Any

import click
from rich.console import Console

from kronos_connectors.replay.replay_clock import PacedClock, driven_advance, paced_advance
from kronos_connectors.replay.source import Recording, ReplaySource
from kronos_stream.commands._outcomes import OutcomeCounts, format_skipped
from kronos_stream.commands._progress import progress_bar
from kronos_stream.daemon import service
from kronos_stream.daemon.config.environment import read_settings
from kronos_stream.daemon.config.settings import Settings, variable_name
from kronos_stream.daemon.requests import ForecastResult
from kronos_stream.daemon.roles.standalone import StandaloneRole
from kronos_stream.daemon.telemetry.logs import configure
from kronos_stream.market.clock import Clock, ManualClock, SystemClock
from kronos_stream.market.utc import rfc3339


class ReplayStats:
    """Outcomes of the bars, and how long they took."""

    def __init__(self, clock: Clock, on_progress: Callable[[int, str], None]) -> None:
        """on_progress: called with the number of bars so far and their rate, as text."""
        self._clock, self._on_progress = clock, on_progress
        self._outcomes = OutcomeCounts()
        self._degraded = 0
        self._started: int | None = None
        self._ended = 0

    def start(self) -> bool:
        """Start the measurement, just before the first bar; True the first time."""
        if self._started is not None:
            return False
        self._started = self._ended = self._clock.now()
        return True

    def record_results(self, results: Sequence[ForecastResult]) -> None:
        """Count results that are durable."""
        self._outcomes.add(results)
        self._degraded += sum(bool(result.window and result.window.reasons) for result in results)
        self._ended = self._clock.now()
        figures = self.to_dict(0)
        if figures["bars_per_second"] is not None:
            rates = "{bars_per_second:.0f} bars/s, {forecasts_per_second:.0f} forecasts/s"
            self._on_progress(figures["bars"], rates.format(**figures))

    def to_dict(self, synthetic: int) -> dict[str, Any]:
        """Figures for JSON. synthetic: number of bars that the recording lacks."""
        bars, forecasts = self._outcomes.bars, self._outcomes.forecasts
        seconds = 0.0 if self._started is None else (self._ended - self._started) / 1000
        return {
            "bars": bars,
            "forecasts": forecasts,
            "degraded": self._degraded,
            "skipped": self._outcomes.skipped(),
            "synthetic": synthetic,
            "seconds": seconds,
            "bars_per_second": round(bars / seconds, 1) if seconds else None,
            "forecasts_per_second": round(forecasts / seconds, 1) if seconds else None,
        }


def run(
    files: tuple[str, ...],
    *,
    model: str | None,
    lookback: int | None,
    speed: float,
    start: int | None,
    bars: int | None,
    out: Path | None,
    kafka: str | None,
    state: Path | None,
    as_json: bool,
) -> None:
    """Replay to the end of the data, or until interrupted, and print the figures."""
    if out is not None and kafka is not None:
        raise click.UsageError("--out and --kafka exclude each other")
    console = Console(stderr=True)
    with ExitStack() as stack:
        if state is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="kronos-replay-"))
            state = Path(folder) / "state.sqlite"
        overrides = {
            "state_file": state,
            "symbols_file": "",
            "model": model,
            "lookback": lookback,
            # Never the daemon's own sinks: old forecasts do not belong in live topics.
            "sinks": "jsonl" if out else "kafka" if kafka else "",
            "jsonl__path": out,
            "kafka__bootstrap_servers": kafka,
            # At full speed the clock waits for the forecasts, so no bar is too late.
            "catch_up": "all" if isinf(speed) else None,
        }
        settings = read_settings(_environment(overrides), live=False)
        stack.callback(configure(settings.log.format, settings.log.level))
        with console.status("reading the files"):
            recording = Recording.read(files)
        if start is None:
            start = recording.start(settings.lookback)
        if not recording.count(start):
            raise click.UsageError(
                f"no bar closes after {rfc3339(start)}, where forecasts would begin; lower "
                "--lookback or change --from"
            )
        figures = asyncio.run(_replay(settings, recording, start, speed, bars))
    click.echo(json.dumps(figures) if as_json else _report(figures))


async def _replay(
    settings: Settings, recording: Recording, start: int, speed: float, max_bars: int | None
) -> dict[str, Any]:
    """Run the daemon on the recording; returns the figures."""
    with progress_bar() as progress:
        task = progress.add_task("loading the model", total=None)
        wall = SystemClock()

        def show(bars: int, rates: str) -> None:
            progress.update(task, completed=bars, description=f"bars ({rates})")

        stats = ReplayStats(wall, show)

        async def wait_until_idle() -> None:
            await daemon.drain()
            if stats.start():
                total = recording.count(start) if max_bars is None else None
                progress.update(task, description="bars", total=total)

        clock: ManualClock | PacedClock
        if isinf(speed):
            clock = ManualClock(start)
            advance = driven_advance(clock, wait_until_idle, lambda: daemon.next_timer)
        else:
            clock = PacedClock(start, speed)
            advance = paced_advance(clock, wait_until_idle)
        source = ReplaySource(recording, clock, start, advance_to=advance, max_closes=max_bars)
        daemon = StandaloneRole(
            settings,
            {recording.venue: source},
            service.build_sinks(settings, wall, Random(0)),
            clock=clock,
            random=Random(0),
            series=recording.series,
            on_results=stats.record_results,
        )
        await service.serve(daemon)
    synthetic = daemon.metrics.registry.get_sample_value(
        "kronos_synthetic_bars_total", {"venue": recording.venue}
    )
    return stats.to_dict(int(synthetic or 0))


def _environment(overrides: Mapping[str, object]) -> dict[str, str]:
    """The process's environment with ``overrides``, those that are not None, on top."""
    # No HTTP port to collide with other replays, and no log lines about the daemon's start.
    defaults = {variable_name("http", "port"): "0", variable_name("log", "level"): "warning"}
    given = {variable_name(name): str(v) for name, v in overrides.items() if v is not None}
    return defaults | os.environ | given


def _report(figures: Mapping[str, Any]) -> str:
    speed = figures["forecasts_per_second"]
    skipped = format_skipped(figures["skipped"])
    return (
        f"{figures['bars']} bars, {figures['forecasts']} forecasts in {figures['seconds']:.1f} s"
        + (f" ({speed:g} per second)" if speed else "")
        + f"; {figures['synthetic']} bars were missing and are synthetic"
        + f", {figures['degraded']} forecasts degraded"
        + (f"; skipped: {skipped}" if skipped else "")
    )
