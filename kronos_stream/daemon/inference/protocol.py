"""Messages between the daemon and its worker process, and their framing.

Both ends are this program and share a socket pair, so a frame is a length and a pickle. Nothing
here imports torch, because the daemon's process imports this module too.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from kronos_stream.forecast.message import Engine, Model
from kronos_stream.forecast.outlook import Outlook, PublishedPaths

_T = TypeVar("_T")

FRAME_LENGTH = struct.Struct("<Q")
"""Prefix of each frame: its length in bytes."""

_CHUNK_SIZE = 32
"""Requests or results per frame; the event loop serves other tasks between frames."""


@dataclass(frozen=True, slots=True)
class ForecastConfig:
    """Model and sampling of a worker; constant during its life."""

    model: str
    tokenizer: str | None = None
    revision: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    threads: int = 1
    max_context: int | None = None
    """Bars; None uses the checkpoint's training length."""
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


class ModelIdentity(NamedTuple):
    """The loaded model and the engine, as they appear in messages."""

    model: Model
    engine: Engine


class InferenceRequest(NamedTuple):
    """One context to forecast from, in the venue's units."""

    series: str
    timeframe: str
    values: NDArray[np.float32]  # (L, 5 | 6)
    times: NDArray[np.int64]  # (L,) UTC ms
    last: float
    """Last close."""


class LoadModel(NamedTuple):
    """First message of the daemon."""

    config: ForecastConfig
    measure: bool
    """True to time a forecast, which determines the size of batches."""


class RequestChunk(NamedTuple):
    """A part of a batch; the last part starts the inference."""

    requests: list[InferenceRequest]
    is_last: bool


class ModelLoaded(NamedTuple):
    """Answer to :class:`LoadModel`."""

    identity: ModelIdentity
    measured_series: int
    """Number of series in the timed forecast, 0 if there was none."""
    measured_seconds: float
    """Duration of the timed forecast."""


class LoadFailed(NamedTuple):
    """The model or its settings cannot be used."""

    reason: str


class InferenceResult(NamedTuple):
    """Forecast of one request, in the venue's units."""

    outlook: Outlook
    scale: float
    """Factor applied to prices for the model."""


class InferenceFailure(NamedTuple):
    """A request that cannot be forecast, in any batch."""

    reason: str


class ResultChunk(NamedTuple):
    """A part of a batch's results, in the order of the requests."""

    results: list[InferenceResult | InferenceFailure]
    is_last: bool
    seconds: float
    """Duration of the whole batch in the worker."""


Message: TypeAlias = LoadModel | RequestChunk | ModelLoaded | LoadFailed | ResultChunk


def encode_frame(message: Message) -> bytes:
    """Return the message as a frame with its length prefix."""
    body = pickle.dumps(message, protocol=5)
    return FRAME_LENGTH.pack(len(body)) + body


def decode_frame(body: bytes) -> Any:  # noqa: ANN401 - the reader knows which messages may come
    """Return the message of a frame without its length prefix."""
    return pickle.loads(body)  # noqa: S301 - written by this program


def read_frames(stream: BinaryIO) -> Iterator[Any]:
    """Yield messages from a blocking stream until it ends."""
    while len(prefix := stream.read(FRAME_LENGTH.size)) == FRAME_LENGTH.size:
        yield decode_frame(stream.read(FRAME_LENGTH.unpack(prefix)[0]))


def split_chunks(items: Sequence[_T]) -> Iterator[tuple[list[_T], bool]]:
    """Yield the parts of a batch that are sent in one frame each, with a flag for the last."""
    for first in range(0, len(items), _CHUNK_SIZE):
        yield list(items[first : first + _CHUNK_SIZE]), first + _CHUNK_SIZE >= len(items)
