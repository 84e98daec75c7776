"""From results to messages in the outbox, and dead letters for what cannot go further."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Literal

import structlog

from kronos_stream.daemon.due import Result
from kronos_stream.daemon.job import Identity, Plan
from kronos_stream.daemon.outbox import Message, Outbox
from kronos_stream.forecast.compose import Composer, dead_letter, removal
from kronos_stream.forecast.message import Engine, Latency, Model, Sampling
from kronos_stream.forecast.outlook import Outlook
from kronos_stream.forecast.sink import Refusal
from kronos_stream.market.clock import Clock
from kronos_stream.market.contexts import Window
from kronos_stream.market.series import Series

_log = structlog.get_logger()

_TURN = 32
"""Messages composed before other tasks have their turn."""

_MOST_WAITING = 100
_PAUSE_SECONDS = 0.5
"""Together 200 dead letters of venues a second; the counters count them all."""


def composer(plan: Plan, identity: Identity) -> Composer:
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
            paths=plan.paths,
            temperature=plan.temperature,
            top_k=plan.top_k,
            top_p=plan.top_p,
            seed=plan.seed,
            anchor=plan.anchor,
        ),
    )


class Press:
    """Writes what came of due bars, and what could not be taken in, into the outbox."""

    def __init__(
        self,
        compose: Composer,
        outbox: Outbox,
        clock: Clock,
        wall: Clock,
        *,
        follows: Callable[[Series], bool],
        told: Callable[[Sequence[Result], Sequence[Message]], None],
        remembers: bool = True,
    ) -> None:
        """``clock`` is the market's, records carry the time of ``wall``.

        follows: whether a series is still followed. Once readers were told that it is not, no
            forecast that was under way may come.
        told: results and the forecasts among them, once they are durable.
        remembers: whether outcomes are recorded; where a log tells what is done, they are not.
        """
        self._remembers = remembers
        self._compose, self._outbox = compose, outbox
        self._clock, self._wall, self._follows, self._told = clock, wall, follows, told

    async def publish(self, results: Sequence[Result]) -> Sequence[Result]:
        """Compose the forecasts; all is durable when this returns: what became of the bars."""
        composed: list[tuple[Result, Message | None]] = []
        for i, result in enumerate(results, 1):
            message = None
            if result.window is not None and result.outlook is not None:
                message = self._forecast(result, result.window, result.outlook)
            composed.append((result, message))
            if i % _TURN == 0:
                await asyncio.sleep(0)
        final = [
            (result, message) if self._follows(result.due.series) else (result.removed, None)
            for result, message in composed
        ]
        messages = [message for _, message in final if message is not None]
        outcomes = [result.outcome for result, _ in final] if self._remembers else []
        await self._outbox.publish(outcomes, messages)
        told = [result for result, _ in final]
        self._told(told, messages)
        return told

    async def retract(self, series: Sequence[str]) -> None:
        """Tell readers that these series are not forecast any more; durable on return."""
        now = self._wall.now()
        gone = [removal(name, at=now) for name in series]
        await self._outbox.publish([], [Message("removal", *one[1:]) for one in gone])

    def _forecast(self, result: Result, window: Window, outlook: Outlook) -> Message:
        due = result.due
        composed = self._compose.forecast(
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
        # The outbox measures latency by the wall clock, bars arrive by the market's.
        ago = self._clock.now() - due.received
        return Message(
            "forecast", composed.key, composed.value, composed.headers, self._wall.now() - ago
        )


class Graveyard:
    """Dead letters of what venues sent: bounded, so that a flood of garbage stays a trickle."""

    def __init__(self, outbox: Outbox, wall: Clock) -> None:
        self._outbox, self._wall = outbox, wall
        self._waiting: deque[Message] = deque()
        self._lost = 0
        self._news = asyncio.Event()

    def bury(self, series: Series | None, reason: str, raw: bytes) -> None:
        """Keep a frame or candle that cannot be. Returns at once."""
        if len(self._waiting) >= _MOST_WAITING:
            self._lost += 1
            return
        what: Literal["candle", "frame"] = "frame" if series is None else "candle"
        name = None if series is None else series.name
        letter = dead_letter(what, reason, raw, at=self._wall.now(), series=name)
        self._waiting.append(Message("deadletter", letter.key, letter.value, letter.headers))
        self._news.set()

    async def run(self) -> None:
        """Put them into the outbox, a few a second at most; until cancelled."""
        while True:
            await self._news.wait()
            self._news.clear()
            await self.flush()
            await asyncio.sleep(_PAUSE_SECONDS)

    async def flush(self) -> None:
        messages = list(self._waiting)
        self._waiting.clear()
        if self._lost:
            _log.warning("dead letters left out: too many at once", number=self._lost)
            self._lost = 0
        if messages:
            await self._outbox.publish([], messages)


def refused(sink: str, refusal: Refusal, at: int) -> Message:
    """The dead letter of a record that ``sink`` will never take. at: UTC ms."""
    record = refusal.record
    series = record.key or None
    letter = dead_letter("record", refusal.reason, record.value, at=at, series=series, sink=sink)
    return Message("deadletter", letter.key, letter.value, letter.headers)
