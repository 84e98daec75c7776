"""Interface between the daemon and the model: batches of windows in, forecasts out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, TypeAlias

from kronos_stream.bars.window import Window
from kronos_stream.daemon.inference.protocol import (
    ForecastConfig,
    InferenceFailure,
    InferenceResult,
    ModelIdentity,
)
from kronos_stream.daemon.telemetry.metrics import Metrics


class WorkerError(Exception):
    """The model or its settings cannot be used; the message names the cause for the user."""


class WorkerLost(Exception):  # noqa: N818
    """The worker process cannot be started any more."""


class BatchResult(NamedTuple):
    """Results of a batch, in the order of its windows."""

    results: list[InferenceResult | InferenceFailure]
    seconds: float
    """Duration of the inference itself."""


class InferenceBackend(Protocol):
    """One or more workers that forecast with the same model."""

    def problem(self) -> str:
        """Reason why forecasts are not possible at the moment; empty if they are."""

    def estimate_seconds(self, count: int) -> float:
        """Estimated duration of a batch of ``count`` series; 0 before the first measurement."""

    def capacity(self, seconds: float) -> int:
        """Number of series that can be forecast in this time; at least one."""

    async def start(self) -> ModelIdentity:
        """Load the model and measure its speed. Raises WorkerError and WorkerLost."""

    async def forecast(self, windows: Sequence[Window], deadline: float) -> BatchResult:
        """Forecast from each window. deadline: seconds for each attempt. Raises WorkerLost."""

    async def run(self) -> None:
        """Keep the workers alive until cancelled. Raises WorkerLost."""

    async def close(self) -> None:
        """End the workers; bounded in time."""


WorkerFactory: TypeAlias = Callable[[ForecastConfig, Metrics], InferenceBackend]
