"""Inference worker, publisher and scheduler of a role that forecasts."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Protocol, TypeAlias

from kronos_stream.bars.window import Window
from kronos_stream.daemon.config.settings import Settings
from kronos_stream.daemon.delivery.outbox import Outbox
from kronos_stream.daemon.delivery.publisher import ForecastPublisher, build_composer
from kronos_stream.daemon.inference.backend import WorkerFactory
from kronos_stream.daemon.inference.pool import create_backend
from kronos_stream.daemon.inference.protocol import ModelIdentity
from kronos_stream.daemon.requests import ForecastRequest, ForecastResult
from kronos_stream.daemon.roles import stall_checks
from kronos_stream.daemon.scheduling.scheduler import Scheduler
from kronos_stream.daemon.status.watchdog import StallCheck
from kronos_stream.daemon.telemetry.metrics import Metrics
from kronos_stream.interfaces.sink import Envelope
from kronos_stream.market.clock import Clock
from kronos_stream.market.series import Series

Publish: TypeAlias = Callable[[Sequence[ForecastResult]], Awaitable[Sequence[ForecastResult]]]


class WindowSource(Protocol):
    """Source of the scheduler's windows; it also counts the bars still to come."""

    async def window(self, request: ForecastRequest) -> Window | None: ...

    def outstanding_bars(self, close: int) -> int: ...


class Forecasting:
    """The way from forecast requests to messages in the outbox."""

    publisher: ForecastPublisher
    scheduler: Scheduler

    def __init__(
        self,
        settings: Settings,
        clock: Clock,
        wall: Clock,
        metrics: Metrics,
        worker_factory: WorkerFactory | None,
    ) -> None:
        """worker_factory: makes the worker of each device; None starts processes."""
        self.worker = create_backend(
            settings.forecast_config(),
            settings.devices,
            metrics,
            standby=settings.standby,
            worker_factory=worker_factory,
        )
        self._settings, self._metrics = settings, metrics
        self._clock, self._wall = clock, wall

    def create_publisher(
        self,
        identity: ModelIdentity,
        outbox: Outbox,
        *,
        is_followed: Callable[[Series], bool],
        on_published: Callable[[Sequence[ForecastResult], Sequence[Envelope]], None],
        record_outcomes: bool,
    ) -> None:
        """identity: of the loaded model. The rest is as for :class:`ForecastPublisher`."""
        self.publisher = ForecastPublisher(
            build_composer(self._settings.forecast_config(), identity),
            outbox,
            self._clock,
            self._wall,
            is_followed=is_followed,
            on_published=on_published,
            record_outcomes=record_outcomes,
        )

    def create_scheduler(
        self, windows: WindowSource, publish: Publish, *, max_deadline: float = 60.0
    ) -> None:
        """publish, max_deadline: as for :class:`Scheduler`."""
        settings = self._settings
        self.scheduler = Scheduler(
            self.worker,
            windows.window,
            windows.outstanding_bars,
            publish,
            self._clock,
            self._metrics,
            catch_up=settings.catch_up,
            batch_wait=settings.batch_wait,
            batch_deadline=settings.batch_deadline,
            max_deadline=max_deadline,
        )

    def stall_checks(self) -> Iterable[StallCheck]:
        return stall_checks.forecasting(self.scheduler, self.worker, self._metrics)
