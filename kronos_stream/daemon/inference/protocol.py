"""What the daemon and its worker process say to each other, and how it is framed.

Both ends are this program and share one socket, so frames are a length and a pickle. Nothing here
imports torch: the event loop's process needs these words too.
"""

from __future__ import annotations

import pickle
import struct
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kronos_stream.forecast.outlook import Outlook, PublishedPaths

FRAME_LENGTH = struct.Struct("<Q")
"""What goes before each frame: how many bytes it has."""


@dataclass(frozen=True, slots=True)
class ForecastConfig:
    """What a worker draws; fixed for its life."""

    model: str
    tokenizer: str | None = None
    revision: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    threads: int = 1
    max_context: int | None = None
    """Bars; None takes what the checkpoint was trained on."""
    lookback: int = 488
    horizon: int = 24
    paths: int = 32
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 0.9
    seed: int = 0
    anchor: bool = True
    quantiles: tuple[float, ...] = (0.05, 0.25, 0.5, 0.75, 0.95)
    include_paths: PublishedPaths = "none"


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """Who forecasts, for messages: what was loaded, and where it computes."""

    model: str
    revision: str | None
    """Commit on the hub; of a folder, the digest of its weights."""
    tokenizer: str
    tokenizer_revision: str | None
    device: str
    dtype: str
    max_context: int
    engine: str
    """Version of this program."""


class InferenceRequest(NamedTuple):
    """One context to forecast from, in the venue's units."""

    series: str
    timeframe: str
    values: NDArray[np.float32]  # (L, 5 | 6)
    times: NDArray[np.int64]  # (L,) UTC ms
    last: float


class LoadModel(NamedTuple):
    """The daemon's first word: load the model."""

    config: ForecastConfig
    measure: bool
    """Whether to time a forecast, so that batches can be sized."""


class RequestChunk(NamedTuple):
    """A piece of a batch; its last piece starts the work."""

    requests: list[InferenceRequest]
    is_last: bool


class ModelLoaded(NamedTuple):
    """The model is loaded."""

    identity: ModelIdentity
    measured_series: int
    """How many series were forecast to measure, 0 if none."""
    measured_seconds: float
    """How long they took."""


class LoadFailed(NamedTuple):
    """The plan cannot be carried out; the user can mend it."""

    reason: str


class InferenceResult(NamedTuple):
    """A task's forecast, in the venue's units."""

    outlook: Outlook
    scale: float
    """What prices were multiplied with for the model."""


class InferenceFailure(NamedTuple):
    """A task that cannot be forecast, whatever the others are."""

    reason: str


class ResultChunk(NamedTuple):
    """A piece of a batch's results, in the tasks' order."""

    results: list[InferenceResult | InferenceFailure]
    is_last: bool
    seconds: float
    """What the whole batch took in the worker."""


def encode_frame(
    message: LoadModel | RequestChunk | ModelLoaded | LoadFailed | ResultChunk,
) -> bytes:
    """``message`` as it goes over the socket."""
    body = pickle.dumps(message, protocol=5)
    return FRAME_LENGTH.pack(len(body)) + body


def decode_frame(body: bytes) -> Any:  # noqa: ANN401 - whoever reads knows what may come
    """What :func:`frame` put behind the length."""
    return pickle.loads(body)  # noqa: S301 - of our own other half
