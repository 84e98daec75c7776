"""The worker process: loads the model, draws batches, ends when the daemon does.

Started by :mod:`kronos_stream.daemon.inference.supervisor` with one end of a socket pair as its only argument.
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
    FRAME_LENGTH,
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
    decode_frame,
    encode_frame,
)
from kronos_stream.engine import Context, ContextError, Forecaster, SampledPaths
from kronos_stream.engine.sampling import Sampling
from kronos_stream.forecast.outlook import build_outlook
from kronos_stream.forecast.quantiles import check_supported
from kronos_stream.model.checkpoint import WEIGHTS_FILE, CheckpointError, CheckpointLocation

_CHUNK_SIZE = 32
"""Results per frame: the daemon reads one at a time, and does other things in between."""

_BENCHMARK_SERIES = 8
"""Series forecast together to measure the speed, unless one alone takes long."""

_SLOW_SECONDS = 0.25

_PR_SET_PDEATHSIG = 1


class ModelHost:
    """A plan's forecaster: tasks in, results out."""

    def __init__(self, config: ForecastConfig) -> None:
        """Load the model. Raises CheckpointError or ValueError for what the user can mend."""
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
        room = self._forecaster.max_context
        if config.lookback + config.horizon > room:
            raise ValueError(
                f"a lookback of {config.lookback} bars and a horizon of {config.horizon} exceed the "
                f"{room} bars that {config.model} was trained on; set KRONOS_STREAM_LOOKBACK to at "
                f"most {max(room - config.horizon, 2)}"
                + ("" if config.horizon <= room - 2 else ", and KRONOS_STREAM_HORIZON lower")
            )

    def identity(self) -> ModelIdentity:
        found = self._forecaster.checkpoint
        assert found is not None  # noqa: S101 - from_pretrained sets it
        own_tokenizer = self.config.tokenizer or found.tokenizer.name
        bundled = self.config.tokenizer is None and Path(own_tokenizer).is_dir()
        return ModelIdentity(
            model=self.config.model,
            revision=_revision(found.predictor),
            # A folder that holds both halves has one name.
            tokenizer=self.config.model if bundled else own_tokenizer,
            tokenizer_revision=_revision(found.tokenizer),
            device=self._forecaster.device.type,  # whichever card it is, the id is the same
            dtype=str(self._forecaster.dtype).removeprefix("torch."),
            max_context=self._forecaster.max_context,
            engine=__version__,
        )

    def infer(
        self, requests: Sequence[InferenceRequest]
    ) -> list[InferenceResult | InferenceFailure]:
        """One result per task. A task that is refused does not hold up the others."""
        plan = self.config
        scales = [price_scale(task.values) for task in requests]
        contexts = [
            Context(scale_prices(task.values, scale), task.times, task.series, task.timeframe)
            for task, scale in zip(requests, scales, strict=True)
        ]
        try:
            draws = self._forecaster.draw(
                contexts,
                plan.horizon,
                plan.paths,
                temperature=plan.temperature,
                top_k=plan.top_k,
                top_p=plan.top_p,
                seed=plan.seed,
                anchor=plan.anchor,
            )
        except ContextError as error:
            # Contexts are checked before anything is drawn, so looking for it costs little.
            if len(requests) == 1:
                return [InferenceFailure(str(error))]
            middle = len(requests) // 2
            return self.infer(requests[:middle]) + self.infer(requests[middle:])
        return [self._to_result(*drawn) for drawn in zip(requests, scales, draws, strict=True)]

    def _to_result(
        self, task: InferenceRequest, scale: float, draw: SampledPaths
    ) -> InferenceResult | InferenceFailure:
        try:
            made = build_outlook(
                scale_prices(draw.paths, 1 / scale),
                draw.times,
                task.last,
                self.config.quantiles,
                publish=self.config.include_paths,
            )
        except ValueError as error:
            return InferenceFailure(str(error))
        return InferenceResult(made, scale)

    def warm_up(self) -> None:
        """Forecast a made-up series: a GPU's first call takes seconds."""
        self.infer(_synthetic_requests(1, self.config.lookback))

    def measure(self) -> tuple[int, float]:
        """Forecast made-up series: how many in a batch, and its seconds."""
        seconds = 0.0
        for count in (1, _BENCHMARK_SERIES):
            began = time.perf_counter()
            self.infer(_synthetic_requests(count, self.config.lookback))
            seconds = time.perf_counter() - began
            if count == _BENCHMARK_SERIES or seconds > _SLOW_SECONDS:
                break
        return count, seconds


def main() -> NoReturn:
    """Serve the daemon at the other end of the socket until it is gone."""
    _exit_with_parent()
    channel = socket.socket(fileno=int(sys.argv[1]))
    inbox: SimpleQueue[Any] = SimpleQueue()
    threading.Thread(target=_receive_messages, args=(channel, inbox), daemon=True).start()
    load: LoadModel = inbox.get()
    try:
        drawer = ModelHost(load.config)
    except (CheckpointError, ValueError) as error:
        _send(channel, LoadFailed(str(error)))
        sys.exit(0)
    drawer.warm_up()
    series, seconds = drawer.measure() if load.measure else (0, 0.0)
    _send(channel, ModelLoaded(drawer.identity(), series, seconds))
    while True:
        tasks = _receive_batch(inbox)
        began = time.perf_counter()
        results = drawer.infer(tasks)
        seconds = time.perf_counter() - began
        for first in range(0, len(results), _CHUNK_SIZE):
            piece = results[first : first + _CHUNK_SIZE]
            _send(channel, ResultChunk(piece, first + _CHUNK_SIZE >= len(results), seconds))


def _receive_batch(inbox: SimpleQueue[Any]) -> list[InferenceRequest]:
    tasks: list[InferenceRequest] = []
    while True:
        job: RequestChunk = inbox.get()
        tasks += job.requests
        if job.is_last:
            return tasks


def _exit_with_parent() -> None:
    """Stop signals are the parent's to judge; its end is ours, even while we are stopped."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _receive_messages(channel: socket.socket, inbox: SimpleQueue[Any]) -> None:
    """Take in what the parent says; when it is gone, end the process, whatever it does."""
    try:
        with channel.makefile("rb") as stream:
            while len(head := stream.read(FRAME_LENGTH.size)) == FRAME_LENGTH.size:
                inbox.put(decode_frame(stream.read(FRAME_LENGTH.unpack(head)[0])))
    finally:
        os._exit(0)


def _send(channel: socket.socket, message: ModelLoaded | LoadFailed | ResultChunk) -> None:
    try:
        channel.sendall(encode_frame(message))
    except OSError:  # the parent is gone
        os._exit(0)


def _synthetic_requests(count: int, bars: int) -> list[InferenceRequest]:
    """Series of random candles of one minute."""
    random = np.random.default_rng(0)
    times = 60_000 * np.arange(bars)
    tasks = []
    for i in range(count):
        close = 100 + random.normal(0, 0.1, bars).cumsum()
        values = np.stack((close, close + 0.1, close - 0.1, close, close, close * close), axis=1)
        tasks.append(
            InferenceRequest(f"made:up{i}:1m", "1m", values.astype(np.float32), times, 100.0)
        )
    return tasks


def _revision(source: CheckpointLocation) -> str | None:
    """The commit, or what a folder's weights hash to."""
    weights = Path(source.name) / WEIGHTS_FILE
    if source.revision is not None or not weights.is_file():
        return source.revision
    with weights.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()[:16]}"


if __name__ == "__main__":
    main()
