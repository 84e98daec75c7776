"""The worker process: loads the model, draws batches, ends when the daemon does.

Started by :mod:`kronos_stream.daemon.worker` with one end of a socket pair as its only argument.
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
from kronos_stream.daemon.job import (
    LENGTH,
    Done,
    Drawn,
    Failed,
    Identity,
    Job,
    Load,
    Plan,
    Ready,
    Refused,
    Task,
    frame,
    in_scale,
    price_scale,
    unframe,
)
from kronos_stream.engine import Context, ContextError, Draw, Forecaster
from kronos_stream.engine.sampling import Sampling
from kronos_stream.forecast.outlook import build_outlook
from kronos_stream.forecast.quantiles import check_supported
from kronos_stream.model.checkpoint import WEIGHTS_FILE, CheckpointError, Source

_PIECE = 32
"""Results per frame: the daemon reads one at a time, and does other things in between."""

_MEASURED = 8
"""Series forecast together to measure the speed, unless one alone takes long."""

_LONG_SECONDS = 0.25

_PR_SET_PDEATHSIG = 1


class Drawer:
    """A plan's forecaster: tasks in, results out."""

    def __init__(self, plan: Plan) -> None:
        """Load the model. Raises CheckpointError or ValueError for what the user can mend."""
        import torch

        torch.set_num_threads(plan.threads)
        check_supported(plan.quantiles, plan.paths)
        Sampling(plan.temperature, plan.top_k, plan.top_p)
        self.plan = plan
        self._forecaster = Forecaster.from_pretrained(
            plan.model,
            plan.tokenizer,
            plan.revision,
            device=plan.device,
            dtype=plan.dtype,
            max_context=plan.max_context,
        )
        room = self._forecaster.max_context
        if plan.lookback + plan.horizon > room:
            raise ValueError(
                f"a lookback of {plan.lookback} bars and a horizon of {plan.horizon} exceed the "
                f"{room} bars that {plan.model} was trained on; set KRONOS_STREAM_LOOKBACK to at "
                f"most {max(room - plan.horizon, 2)}"
                + ("" if plan.horizon <= room - 2 else ", and KRONOS_STREAM_HORIZON lower")
            )

    def identity(self) -> Identity:
        found = self._forecaster.checkpoint
        assert found is not None  # noqa: S101 - from_pretrained sets it
        own_tokenizer = self.plan.tokenizer or found.tokenizer.name
        bundled = self.plan.tokenizer is None and Path(own_tokenizer).is_dir()
        return Identity(
            model=self.plan.model,
            revision=_revision(found.predictor),
            # A folder that holds both halves has one name.
            tokenizer=self.plan.model if bundled else own_tokenizer,
            tokenizer_revision=_revision(found.tokenizer),
            device=self._forecaster.device.type,  # whichever card it is, the id is the same
            dtype=str(self._forecaster.dtype).removeprefix("torch."),
            max_context=self._forecaster.max_context,
            engine=__version__,
        )

    def draw(self, tasks: Sequence[Task]) -> list[Drawn | Failed]:
        """One result per task. A task that is refused does not hold up the others."""
        plan = self.plan
        scales = [price_scale(task.values) for task in tasks]
        contexts = [
            Context(in_scale(task.values, scale), task.times, task.series, task.timeframe)
            for task, scale in zip(tasks, scales, strict=True)
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
            if len(tasks) == 1:
                return [Failed(str(error))]
            middle = len(tasks) // 2
            return self.draw(tasks[:middle]) + self.draw(tasks[middle:])
        return [self._drawn(*drawn) for drawn in zip(tasks, scales, draws, strict=True)]

    def _drawn(self, task: Task, scale: float, draw: Draw) -> Drawn | Failed:
        try:
            made = build_outlook(
                in_scale(draw.paths, 1 / scale),
                draw.times,
                task.last,
                self.plan.quantiles,
                publish=self.plan.keep,
            )
        except ValueError as error:
            return Failed(str(error))
        return Drawn(made, scale)

    def warm_up(self) -> None:
        """Forecast a made-up series: a GPU's first call takes seconds."""
        self.draw(_made_up(1, self.plan.lookback))

    def measure(self) -> tuple[int, float]:
        """Forecast made-up series: how many in a batch, and its seconds."""
        seconds = 0.0
        for count in (1, _MEASURED):
            began = time.perf_counter()
            self.draw(_made_up(count, self.plan.lookback))
            seconds = time.perf_counter() - began
            if count == _MEASURED or seconds > _LONG_SECONDS:
                break
        return count, seconds


def main() -> NoReturn:
    """Serve the daemon at the other end of the socket until it is gone."""
    _belong_to_parent()
    channel = socket.socket(fileno=int(sys.argv[1]))
    inbox: SimpleQueue[Any] = SimpleQueue()
    threading.Thread(target=_read, args=(channel, inbox), daemon=True).start()
    load: Load = inbox.get()
    try:
        drawer = Drawer(load.plan)
    except (CheckpointError, ValueError) as error:
        _send(channel, Refused(str(error)))
        sys.exit(0)
    drawer.warm_up()
    series, seconds = drawer.measure() if load.measure else (0, 0.0)
    _send(channel, Ready(drawer.identity(), series, seconds))
    while True:
        tasks = _batch(inbox)
        began = time.perf_counter()
        results = drawer.draw(tasks)
        seconds = time.perf_counter() - began
        for first in range(0, len(results), _PIECE):
            piece = results[first : first + _PIECE]
            _send(channel, Done(piece, first + _PIECE >= len(results), seconds))


def _batch(inbox: SimpleQueue[Any]) -> list[Task]:
    tasks: list[Task] = []
    while True:
        job: Job = inbox.get()
        tasks += job.tasks
        if job.complete:
            return tasks


def _belong_to_parent() -> None:
    """Stop signals are the parent's to judge; its end is ours, even while we are stopped."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _read(channel: socket.socket, inbox: SimpleQueue[Any]) -> None:
    """Take in what the parent says; when it is gone, end the process, whatever it does."""
    try:
        with channel.makefile("rb") as stream:
            while len(head := stream.read(LENGTH.size)) == LENGTH.size:
                inbox.put(unframe(stream.read(LENGTH.unpack(head)[0])))
    finally:
        os._exit(0)


def _send(channel: socket.socket, message: Ready | Refused | Done) -> None:
    try:
        channel.sendall(frame(message))
    except OSError:  # the parent is gone
        os._exit(0)


def _made_up(count: int, bars: int) -> list[Task]:
    """Series of random candles of one minute."""
    random = np.random.default_rng(0)
    times = 60_000 * np.arange(bars)
    tasks = []
    for i in range(count):
        close = 100 + random.normal(0, 0.1, bars).cumsum()
        values = np.stack((close, close + 0.1, close - 0.1, close, close, close * close), axis=1)
        tasks.append(Task(f"made:up{i}:1m", "1m", values.astype(np.float32), times, 100.0))
    return tasks


def _revision(source: Source) -> str | None:
    """The commit, or what a folder's weights hash to."""
    weights = Path(source.name) / WEIGHTS_FILE
    if source.revision is not None or not weights.is_file():
        return source.revision
    with weights.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()[:16]}"


if __name__ == "__main__":
    main()
