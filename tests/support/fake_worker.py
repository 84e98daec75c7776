"""An inference backend without a model: it takes a given time, and forecasts a flat line.

As a program it is ``kronos-stream run`` with this backend. With it tests measure everything but
the model, and run several daemons on a machine with too few cores for as many models.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence

from kronos_stream.bars.window import Window
from kronos_stream.daemon.inference.backend import BatchResult
from kronos_stream.daemon.inference.protocol import InferenceResult, ModelIdentity
from kronos_stream.forecast.message import Engine, Model
from kronos_stream.forecast.outlook import PUBLISHED_CHANNELS, Outlook
from kronos_stream.forecast.summary import Summary


def daemon_command(seconds_per_forecast: float) -> tuple[str, ...]:
    """Command of a daemon with this backend; it works in any current directory."""
    return (sys.executable, "-P", __file__, str(seconds_per_forecast))


class FakeWorker:
    """Inference backend that sleeps, and returns the last close as its forecast."""

    def __init__(self, seconds_per_forecast: float) -> None:
        self._seconds_per_forecast = seconds_per_forecast

    def problem(self) -> str:
        return ""

    async def start(self) -> ModelIdentity:
        await asyncio.sleep(self._seconds_per_forecast)
        return ModelIdentity(
            Model(name="none", revision=None, tokenizer="none", tokenizer_revision=None),
            Engine(version="stand-in", device="cpu", dtype="float32"),
        )

    async def run(self) -> None:
        await asyncio.Event().wait()

    async def close(self) -> None:
        await asyncio.sleep(0)

    def estimate_seconds(self, count: int) -> float:
        return count * self._seconds_per_forecast

    def capacity(self, seconds: float) -> int:
        return max(1, int(seconds / self._seconds_per_forecast))

    async def forecast(self, windows: Sequence[Window], deadline: float) -> BatchResult:
        seconds = self.estimate_seconds(len(windows))
        async with asyncio.timeout(deadline):
            await asyncio.sleep(seconds)
        return BatchResult(
            [InferenceResult(_flat_outlook(window), 1.0) for window in windows], seconds
        )


def _flat_outlook(window: Window) -> Outlook:
    close = window.last.close
    bands = {channel: {"mean": [close], "q50": [close]} for channel in PUBLISHED_CHANNELS}
    summary = Summary(0.0, 0.0, {"q50": 0.0}, None, None)
    ahead = window.series.timeframe.after(window.last.time)
    return Outlook([ahead], bands, summary, 0)


def main(seconds_per_forecast: float) -> None:
    """Run the daemon with this backend."""
    from kronos_stream.daemon import service
    from kronos_stream.daemon.config.environment import read_settings
    from kronos_stream.daemon.telemetry.logs import configure

    settings = read_settings(os.environ)
    configure(settings.log.format, settings.log.level)
    role = service.build_role(settings, worker_factory=lambda *_: FakeWorker(seconds_per_forecast))
    asyncio.run(service.serve(role))


if __name__ == "__main__":
    main(float(sys.argv[1]))
