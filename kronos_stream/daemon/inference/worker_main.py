"""Main program of the worker process: loads the model and runs batches until the daemon ends.

:mod:`kronos_stream.daemon.inference.process` starts it with the number of a socket's file
descriptor as its only argument.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NoReturn

import numpy as np

from kronos_stream import __version__
from kronos_stream.bars.scaling import price_scale, scale_prices
from kronos_stream.daemon.inference.protocol import (
    ForecastConfig,
    InferenceFailure,
    InferenceRequest,
    InferenceResult,
    LoadFailed,
    LoadModel,
    ModelIdentity,
    ModelLoaded,
    RequestChunk,
    ResultChunk,
    encode_frame,
    read_frames,
    split_chunks,
)
from kronos_stream.engine import Context, ContextError, Forecaster, SampledPaths
from kronos_stream.engine.sampling import Sampling
from kronos_stream.forecast.message import Engine, Model
from kronos_stream.forecast.outlook import build_outlook
from kronos_stream.forecast.quantiles import check_supported
from kronos_stream.model.checkpoint import WEIGHTS_FILE, CheckpointError, CheckpointLocation

_BENCHMARK_SERIES = 8
"""Series in the timed batch, unless a single one already takes long."""

_SLOW_SECONDS = 0.25

_PR_SET_PDEATHSIG = 1


class ModelHost:
    """The loaded model of the worker process."""

    def __init__(self, config: ForecastConfig) -> None:
        """Load the model. Raises CheckpointError or ValueError for settings it cannot use."""
        import torch

        torch.set_num_threads(config.threads)
        check_supported(config.quantiles, config.paths)
        Sampling(config.temperature, config.top_k, config.top_p)
        self.config = config
        self._forecaster = Forecaster.from_pretrained(
            config.model,
            config.tokenizer,
            config.revision,
            device=config.device,
            dtype=config.dtype,
            max_context=config.max_context,
        )
        limit = self._forecaster.max_context
        if config.lookback + config.horizon > limit:
            raise ValueError(
                f"a lookback of {config.lookback} bars and a horizon of {config.horizon} exceed "
                f"the {limit} bars that {config.model} was trained on; set KRONOS_STREAM_LOOKBACK "
                f"to at most {max(limit - config.horizon, 2)}"
                + ("" if config.horizon <= limit - 2 else ", and KRONOS_STREAM_HORIZON lower")
            )

    def identity(self) -> ModelIdentity:
        checkpoint = self._forecaster.checkpoint
        assert checkpoint is not None  # noqa: S101 - from_pretrained sets it
        tokenizer = self.config.tokenizer or checkpoint.tokenizer.name
        bundled = self.config.tokenizer is None and Path(tokenizer).is_dir()
        model = Model(
            name=self.config.model,
            revision=_revision(checkpoint.predictor),
            # A folder with both the predictor and the tokenizer has one name.
            tokenizer=self.config.model if bundled else tokenizer,
            tokenizer_revision=_revision(checkpoint.tokenizer),
        )
        engine = Engine(
            version=__version__,
            device=self._forecaster.device.type,  # without its index, which must not change ids
            dtype=str(self._forecaster.dtype).removeprefix("torch."),
        )
        return ModelIdentity(model, engine)

    def infer(
        self, requests: Sequence[InferenceRequest]
    ) -> list[InferenceResult | InferenceFailure]:
        """Return one result per request; an invalid request does not affect the others."""
        config = self.config
        scales = [price_scale(request.values) for request in requests]
        contexts = [
            Context(scale_prices(one.values, scale), one.times, one.series, one.timeframe)
            for one, scale in zip(requests, scales, strict=True)
        ]
        try:
            sampled = self._forecaster.draw(
                contexts,
                config.horizon,
                config.paths,
                temperature=config.temperature,
                top_k=config.top_k,
                top_p=config.top_p,
                seed=config.seed,
                anchor=config.anchor,
            )
        except ContextError as error:
            # Contexts are checked before sampling, so isolating the invalid one costs little.
            if len(requests) == 1:
                return [InferenceFailure(str(error))]
            middle = len(requests) // 2
            return self.infer(requests[:middle]) + self.infer(requests[middle:])
        return [self._to_result(*parts) for parts in zip(requests, scales, sampled, strict=True)]

    def _to_result(
        self, request: InferenceRequest, scale: float, sampled: SampledPaths
    ) -> InferenceResult | InferenceFailure:
        try:
            outlook = build_outlook(
                scale_prices(sampled.paths, 1 / scale),
                sampled.times,
                request.last,
                self.config.quantiles,
                publish=self.config.include_paths,
            )
        except ValueError as error:
            return InferenceFailure(str(error))
        return InferenceResult(outlook, scale)

    def warm_up(self) -> None:
        """Forecast a synthetic series once, because a GPU's first call takes seconds."""
        self.infer(_synthetic_requests(1, self.config.lookback))

    def measure(self) -> tuple[int, float]:
        """Time a batch of synthetic series; return its size and seconds."""
        seconds = 0.0
        for count in (1, _BENCHMARK_SERIES):
            began = time.perf_counter()
            self.infer(_synthetic_requests(count, self.config.lookback))
            seconds = time.perf_counter() - began
            if count == _BENCHMARK_SERIES or seconds > _SLOW_SECONDS:
                break
        return count, seconds


def main() -> NoReturn:
    """Serve the daemon at the other end of the socket until it exits."""
    _tie_to_parent()
    connection = socket.socket(fileno=int(sys.argv[1]))
    inbox: SimpleQueue[Any] = SimpleQueue()
    threading.Thread(target=_receive_messages, args=(connection, inbox), daemon=True).start()
    load: LoadModel = inbox.get()
    try:
        host = ModelHost(load.config)
    except (CheckpointError, ValueError) as error:
        _send(connection, LoadFailed(str(error)))
        sys.exit(0)
    host.warm_up()
    series, seconds = host.measure() if load.measure else (0, 0.0)
    _send(connection, ModelLoaded(host.identity(), series, seconds))
    while True:
        requests = _receive_batch(inbox)
        began = time.perf_counter()
        results = host.infer(requests)
        seconds = time.perf_counter() - began
        for chunk, is_last in split_chunks(results):
            _send(connection, ResultChunk(chunk, is_last, seconds))


def _receive_batch(inbox: SimpleQueue[Any]) -> list[InferenceRequest]:
    requests: list[InferenceRequest] = []
    while True:
        chunk: RequestChunk = inbox.get()
        requests += chunk.requests
        if chunk.is_last:
            return requests


def _tie_to_parent() -> None:
    """Ignore signals that stop the daemon, and be killed when it exits, even while suspended."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _receive_messages(connection: socket.socket, inbox: SimpleQueue[Any]) -> None:
    """Queue the daemon's messages; when it has exited, end this process at once."""
    try:
        with connection.makefile("rb") as stream:
            for message in read_frames(stream):
                inbox.put(message)
    finally:
        os._exit(0)


def _send(connection: socket.socket, message: ModelLoaded | LoadFailed | ResultChunk) -> None:
    try:
        connection.sendall(encode_frame(message))
    except OSError:  # the daemon has exited
        os._exit(0)


def _synthetic_requests(count: int, bars: int) -> list[InferenceRequest]:
    """Requests with random one-minute candles."""
    random = np.random.default_rng(0)
    times = 60_000 * np.arange(bars)
    requests = []
    for i in range(count):
        close = 100 + random.normal(0, 0.1, bars).cumsum()
        values = np.stack((close, close + 0.1, close - 0.1, close, close, close * close), axis=1)
        requests.append(
            InferenceRequest(f"made:up{i}:1m", "1m", values.astype(np.float32), times, 100.0)
        )
    return requests


def _revision(source: CheckpointLocation) -> str | None:
    """Return the commit, or for a folder the digest of its weights."""
    weights = Path(source.name) / WEIGHTS_FILE
    if source.revision is not None or not weights.is_file():
        return source.revision
    with weights.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()[:16]}"


if __name__ == "__main__":
    main()
