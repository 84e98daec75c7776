"""Publisher of forecasts: composes messages from results and puts them into the outbox."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from kronos_stream.daemon.delivery.outbox import Outbox
from kronos_stream.daemon.inference.protocol import ForecastConfig, ModelIdentity
from kronos_stream.daemon.requests import ForecastResult
from kronos_stream.forecast.compose import Composer, removal
from kronos_stream.forecast.message import Latency, Sampling
from kronos_stream.interfaces.sink import Envelope
from kronos_stream.market.clock import Clock
from kronos_stream.market.series import Series

_YIELD_EVERY = 32
"""Messages composed before other tasks get a turn."""


def build_composer(config: ForecastConfig, identity: ModelIdentity) -> Composer:
    """Create the composer for messages of a worker."""
    return Composer(
        identity.model,
        identity.engine,
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
    """Puts forecasts and outcomes into the outbox."""

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
        """clock: of the market. wall: of the times in records.

        is_followed: after the removal of a series was published, no forecast of it may follow.
        on_published: called with results and forecasts once they are durable.
        record_outcomes: False if progress is kept elsewhere, as committed offsets are.
        """
        self._composer, self._outbox, self._clock, self._wall = composer, outbox, clock, wall
        self._is_followed, self._on_published = is_followed, on_published
        self._record_outcomes = record_outcomes

    async def publish(self, results: Sequence[ForecastResult]) -> Sequence[ForecastResult]:
        """Publish the forecasts among the results; everything is durable on return.

        Returns the results with those of series removed meanwhile replaced.
        """
        composed: list[tuple[ForecastResult, Envelope | None]] = []
        for i, result in enumerate(results, 1):
            composed.append((result, self._compose(result)))
            if i % _YIELD_EVERY == 0:
                await asyncio.sleep(0)
        final, envelopes, received = [], [], []
        # The outbox measures latency by the wall clock; bars arrive by the market's clock.
        ahead = self._wall.now() - self._clock.now()
        for result, envelope in composed:
            if not self._is_followed(result.request.series):
                final.append(ForecastResult(result.request, reason="removed"))
                continue
            final.append(result)
            if envelope is not None:
                envelopes.append(envelope)
                received.append(result.request.received + ahead)
        outcomes = [result.outcome for result in final] if self._record_outcomes else []
        await self._outbox.publish(outcomes, envelopes, received=received)
        self._on_published(final, envelopes)
        return final

    async def retract(self, series: Sequence[str]) -> None:
        """Publish the removal of series; durable on return."""
        now = self._wall.now()
        await self._outbox.publish([], [removal(name, at=now) for name in series])

    def _compose(self, result: ForecastResult) -> Envelope | None:
        if result.window is None or result.outlook is None:
            return None
        request = result.request
        return self._composer.forecast(
            result.window,
            result.outlook,
            created=self._wall.now(),
            latency=Latency(
                close_to_received=request.received - request.close,
                queued=result.queued_ms,
                compute=result.compute_ms,
            ),
            scale=result.scale,
        )
