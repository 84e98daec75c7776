"""From results to messages in the outbox, and dead letters for what cannot go further."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Literal

import structlog

from kronos_stream.bars.window import Window
from kronos_stream.daemon.delivery.outbox import Outbox
from kronos_stream.daemon.inference.protocol import ForecastConfig, ModelIdentity
from kronos_stream.daemon.requests import ForecastResult
from kronos_stream.forecast.compose import Composer, dead_letter, removal
from kronos_stream.forecast.message import Engine, Latency, Model, Sampling
from kronos_stream.forecast.outlook import Outlook
from kronos_stream.interfaces.sink import Envelope, Refusal
from kronos_stream.market.clock import Clock
from kronos_stream.market.series import Series

_log = structlog.get_logger()

_YIELD_EVERY = 32
"""Messages composed before other tasks have their turn."""

_MAX_QUEUED = 100
_FLUSH_INTERVAL_SECONDS = 0.5
"""Together 200 dead letters of venues a second; the counters count them all."""


def build_composer(config: ForecastConfig, identity: ModelIdentity) -> Composer:
    """What writes the messages of the worker that ``identity`` describes."""
    return Composer(
        Model(
            name=identity.model,
            revision=identity.revision,
            tokenizer=identity.tokenizer,
            tokenizer_revision=identity.tokenizer_revision,
        ),
        Engine(version=identity.engine, device=identity.device, dtype=identity.dtype),
        Sampling(
            paths=config.paths,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            seed=config.seed,
            anchor=config.anchor,
        ),
    )


class ForecastPublisher:
    """Writes what came of due bars, and what could not be taken in, into the outbox."""

    def __init__(
        self,
        composer: Composer,
        outbox: Outbox,
        clock: Clock,
        wall: Clock,
        *,
        is_followed: Callable[[Series], bool],
        on_published: Callable[[Sequence[ForecastResult], Sequence[Envelope]], None],
        record_outcomes: bool = True,
    ) -> None:
        """``clock`` is the market's, records carry the time of ``wall``.

        follows: whether a series is still followed. Once readers were told that it is not, no
            forecast that was under way may come.
        told: results and the forecasts among them, once they are durable.
        remembers: whether outcomes are recorded; where a log tells what is done, they are not.
        """
        self._record_outcomes = record_outcomes
        self._composer, self._outbox = composer, outbox
        self._clock, self._wall, self._is_followed, self._on_published = (
            clock,
            wall,
            is_followed,
            on_published,
        )

    async def publish(self, results: Sequence[ForecastResult]) -> Sequence[ForecastResult]:
        """Compose the forecasts; all is durable when this returns: what became of the bars."""
        composed: list[tuple[ForecastResult, Envelope | None]] = []
        for i, result in enumerate(results, 1):
            message = None
            if result.window is not None and result.outlook is not None:
                message = self._compose_forecast(result, result.window, result.outlook)
            composed.append((result, message))
            if i % _YIELD_EVERY == 0:
                await asyncio.sleep(0)
        final = [
            (result, message)
            if self._is_followed(result.request.series)
            else (result.as_removed, None)
            for result, message in composed
        ]
        messages = [message for _, message in final if message is not None]
        outcomes = [result.outcome for result, _ in final] if self._record_outcomes else []
        # The outbox measures latency by the wall clock; bars arrive by the market's clock.
        ahead = self._wall.now() - self._clock.now()
        received = [
            result.request.received + ahead for result, message in final if message is not None
        ]
        await self._outbox.publish(outcomes, messages, received=received)
        told = [result for result, _ in final]
        self._on_published(told, messages)
        return told

    async def retract(self, series: Sequence[str]) -> None:
        """Tell readers that these series are not forecast any more; durable on return."""
        now = self._wall.now()
        await self._outbox.publish([], [removal(name, at=now) for name in series])

    def _compose_forecast(
        self, result: ForecastResult, window: Window, outlook: Outlook
    ) -> Envelope:
        due = result.request
        return self._composer.forecast(
            window,
            outlook,
            created=self._wall.now(),
            latency=Latency(
                close_to_received=due.received - due.close,
                queued=result.queued_ms,
                compute=result.compute_ms,
            ),
            scale=result.scale,
        )


class DeadLetterQueue:
    """Dead letters of what venues sent: bounded, so that a flood of garbage stays a trickle."""

    def __init__(self, outbox: Outbox, wall: Clock) -> None:
        self._outbox, self._wall = outbox, wall
        self._queue: deque[Envelope] = deque()
        self._dropped = 0
        self._wakeup = asyncio.Event()

    def put(self, series: Series | None, reason: str, raw: bytes) -> None:
        """Keep a frame or candle that cannot be. Returns at once."""
        if len(self._queue) >= _MAX_QUEUED:
            self._dropped += 1
            return
        what: Literal["candle", "frame"] = "frame" if series is None else "candle"
        name = None if series is None else series.name
        self._queue.append(dead_letter(what, reason, raw, at=self._wall.now(), series=name))
        self._wakeup.set()

    async def run(self) -> None:
        """Put them into the outbox, a few a second at most; until cancelled."""
        while True:
            await self._wakeup.wait()
            self._wakeup.clear()
            await self.flush()
            await asyncio.sleep(_FLUSH_INTERVAL_SECONDS)

    async def flush(self) -> None:
        messages = list(self._queue)
        self._queue.clear()
        if self._dropped:
            _log.warning("dead letters left out: too many at once", number=self._dropped)
            self._dropped = 0
        if messages:
            await self._outbox.publish([], messages)


def refusal_dead_letter(sink: str, refusal: Refusal, at: int) -> Envelope:
    """The dead letter of a record that ``sink`` will never take. at: UTC ms."""
    record = refusal.record
    series = record.key or None
    return dead_letter("record", refusal.reason, record.value, at=at, series=series, sink=sink)
