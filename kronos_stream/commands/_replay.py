"""The work of ``kronos-stream replay``: the daemon on recorded candles, and what came of them."""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from kronos_connectors.replay.replay_clock import PacedClock, driven_advance, paced_advance
from kronos_connectors.replay.source import Recording, ReplaySource
from kronos_stream.commands.replay import Speed
from kronos_stream.daemon import service
from kronos_stream.daemon.config.environment import read_settings
from kronos_stream.daemon.config.settings import Settings, variable_name
from kronos_stream.daemon.requests import ForecastResult
from kronos_stream.daemon.roles.standalone import StandaloneRole
from kronos_stream.daemon.telemetry.logs import configure
from kronos_stream.market.clock import Clock, ManualClock, SystemClock
from kronos_stream.market.utc import rfc3339


@dataclass(frozen=True, slots=True)
class Options:
    """What the command was told."""

    files: tuple[str, ...]
    model: str | None
    lookback: int | None
    speed: Speed
    start: int | None
    bars: int | None
    out: Path | None
    kafka: str | None
    state: Path | None
    as_json: bool


class ReplayStats:
    """What came of the bars, in how long."""

    def __init__(self, clock: Clock, on_progress: Callable[[int, str], None]) -> None:
        """shown: told how many bars there were so far, and how fast they are."""
        self._clock, self._on_progress = clock, on_progress
        self._outcomes: Counter[str] = Counter()
        self._degraded = 0
        self._started: int | None = None
        self._ended = 0

    def start(self) -> bool:
        """All is ready, and bars are about to come; True the first time."""
        if self._started is not None:
            return False
        self._started = self._ended = self._clock.now()
        return True

    def record_results(self, results: Sequence[ForecastResult]) -> None:
        """Results that are durable."""
        for result in results:
            self._outcomes[result.reason or "forecast"] += 1
            self._degraded += bool(result.window is not None and result.window.reasons)
        self._ended = self._clock.now()
        figures = self.to_dict(0)
        speeds = [figures[f"{what}_per_second"] for what in ("bars", "forecasts")]
        if None not in speeds:
            self._on_progress(figures["bars"], "{:.0f} bars/s, {:.0f} forecasts/s".format(*speeds))

    def to_dict(self, synthetic: int) -> dict[str, Any]:
        """The figures, for machines. synthetic: bars that the recording lacks."""
        bars, forecasts = self._outcomes.total(), self._outcomes["forecast"]
        seconds = 0.0 if self._started is None else (self._ended - self._started) / 1000
        return {
            "bars": bars,
            "forecasts": forecasts,
            "degraded": self._degraded,
            "skipped": {k: v for k, v in sorted(self._outcomes.items()) if k != "forecast"},
            "synthetic": synthetic,
            "seconds": seconds,
            "bars_per_second": round(bars / seconds, 1) if seconds else None,
            "forecasts_per_second": round(forecasts / seconds, 1) if seconds else None,
        }


def run(options: Options) -> None:
    """Replay to the end of the data, or until told to stop, and print the figures."""
    if options.out is not None and options.kafka is not None:
        raise click.UsageError("--out and --kafka: give one")
    console = Console(stderr=True)
    with ExitStack() as stack:
        state = options.state
        if state is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="kronos-replay-"))
            state = Path(folder) / "state.sqlite"
        settings = read_settings(_environment(options, state), live=False)
        stack.callback(configure(settings.log.format, settings.log.level))
        with console.status("reading the files"):
            recording = Recording.read(options.files)
        start = options.start
        if start is None:
            start = recording.start(settings.lookback)
        if not recording.count(start):
            raise click.UsageError(
                f"no bar closes after {rfc3339(start)}, where the forecasts would begin; lower "
                "--lookback or change --from"
            )
        figures = asyncio.run(_replay(options, settings, recording, start, console))
    if options.as_json:
        click.echo(json.dumps(figures))
    else:
        click.echo(_report(figures))


async def _replay(
    options: Options, settings: Settings, recording: Recording, start: int, console: Console
) -> dict[str, Any]:
    """The daemon's life; the figures at its end."""
    with _progress(console) as progress:
        bar = progress.add_task("loading the model", total=None, about="")
        wall = SystemClock()
        total = recording.count(start) if options.bars is None else None
        figures = ReplayStats(
            wall, lambda bars, about: progress.update(bar, completed=bars, about=about)
        )

        async def settled() -> None:
            await daemon.drain()
            if figures.start():
                progress.update(bar, description="bars", total=total)

        clock: ManualClock | PacedClock
        if options.speed == "max":
            clock = ManualClock(start)
            reach = driven_advance(clock, settled, lambda: daemon.next_timer)
        else:
            clock = PacedClock(start, options.speed)
            reach = paced_advance(clock, settled)
        daemon = StandaloneRole(
            settings,
            {
                recording.venue: ReplaySource(
                    recording, clock, start, advance_to=reach, max_closes=options.bars
                )
            },
            service.build_sinks(settings, wall, Random(0)),
            clock=clock,
            random=Random(0),
            series=recording.series,
            on_results=figures.record_results,
        )
        await service.serve(daemon)
    name = "kronos_synthetic_bars_total"
    found = daemon.metrics.registry.get_sample_value(name, {"venue": recording.venue})
    return figures.to_dict(int(found or 0))


def _environment(options: Options, state: Path) -> Mapping[str, str]:
    """The process's, with what the command line says on top."""
    said = {
        "state_file": str(state),
        "symbols_file": "",
        "model": options.model,
        "lookback": options.lookback,
        # Never the daemon's own: old forecasts have no place in live topics.
        "sinks": "jsonl" if options.out else "kafka" if options.kafka else "",
        "jsonl__path": options.out,
        "kafka__bootstrap_servers": options.kafka,
        # Where time waits for us, nothing is late: not even what a hole in the data held up.
        "catch_up": "all" if options.speed == "max" else None,
    }
    # Nobody looks at a replay's health unless asked to, and several run side by side.
    defaults = {variable_name("http", "port"): "0", variable_name("log", "level"): "warning"}
    return (
        defaults
        | os.environ
        | {variable_name(name): str(value) for name, value in said.items() if value is not None}
    )


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[about]}"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def _report(figures: Mapping[str, Any]) -> str:
    skipped = ", ".join(f"{number} {reason}" for reason, number in figures["skipped"].items())
    speed = figures["forecasts_per_second"]
    return (
        f"{figures['bars']} bars, {figures['forecasts']} forecasts in {figures['seconds']:.1f} s"
        + (f" ({speed:g} a second)" if speed else "")
        + f"; {figures['synthetic']} bars were missing and are synthetic"
        + f", {figures['degraded']} forecasts degraded"
        + (f"; skipped: {skipped}" if skipped else "")
    )
