"""Queue of one sink: records are delivered in order, at least once, until they arrive or expire.

A bounded number of records is in memory; the rest is read from the state file when needed. A
record is deleted from the file when the sink has acknowledged it.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Sequence
from math import inf
from random import Random

import structlog

from kronos_stream.backoff import Backoff
from kronos_stream.daemon.storage.state import State
from kronos_stream.daemon.telemetry.metrics import Metrics
from kronos_stream.forecast.compose import dead_letter
from kronos_stream.interfaces.sink import Record, Refusal, Sink, SinkLoginRefused, SinkUnavailable
from kronos_stream.market.clock import Clock

_log = structlog.get_logger()

BATCH_RECORDS, BATCH_BYTES = 500, 4 * 2**20
MEMORY_RECORDS, MEMORY_BYTES = 2_000, 16 * 2**20
DELIVER_TIMEOUT_SECONDS = 60.0
"""Limit for sinks without a deadline of their own."""
LATE_SECONDS = 120.0
"""Age of the oldest record that is reported as a problem, even if no delivery fails."""
_CLOSE_TIMEOUT_SECONDS = 5.0
_MIN_RETRY_SECONDS, _MAX_RETRY_SECONDS = 0.25, 10.0


class SinkQueue:
    """Undelivered records of one sink, and their delivery."""

    def __init__(
        self,
        sink: Sink,
        state: State,
        wall: Clock,
        random: Random,
        metrics: Metrics,
        *,
        max_age: int,
        lock: asyncio.Lock,
        retry_login: bool = True,
    ) -> None:
        """max_age: ms.

        lock: held while rows of the outbox and the records in memory may differ.
        retry_login: whether to retry if the sink refuses the first login.
        """
        self.problem = "not started yet"
        """Reason why nothing is delivered; empty if there is none."""
        self.waiting = 0
        """Number of undelivered records."""
        self.attempts = 0
        """Number of delivery attempts, successful or not."""
        self.idle = asyncio.Event()
        """Set while there are no undelivered records."""
        self._sink, self._state, self._wall, self._metrics = sink, state, wall, metrics
        self._max_age, self._lock = max_age, lock
        self._buffer: deque[tuple[Record, int | None]] = deque()
        self._buffered_bytes = 0
        self._has_more = True
        """True if the file may contain records after those in memory."""
        self._wakeup = asyncio.Event()
        self._started, self._retry_login = False, retry_login
        self._backoff = Backoff(random, initial=_MIN_RETRY_SECONDS, maximum=_MAX_RETRY_SECONDS)
        metrics.initialise_labels(sinks=[sink.name])
        metrics.queue_depth.labels(f"outbox:{sink.name}").set_function(lambda: self.waiting)
        metrics.outbox_age.labels(sink.name).set_function(self._oldest_age_seconds)

    @property
    def first_sequence(self) -> float:
        """Sequence of the oldest undelivered record; infinite if there is none, 0 if unknown."""
        if self._buffer:
            return self._buffer[0][0].sequence
        return 0 if self._has_more or self.waiting else inf

    def enqueue(self, record: Record, received: int | None) -> None:
        """Add the newest record, already in the file. received: UTC ms, for the latency."""
        self.waiting += 1
        if (
            self._has_more
            or len(self._buffer) >= MEMORY_RECORDS
            or self._buffered_bytes >= MEMORY_BYTES
        ):
            self.reload()
        else:
            self._append(record, received)
        self.idle.clear()
        self._wakeup.set()

    def reload(self) -> None:
        """Read further records from the state file."""
        self._has_more = True
        self.idle.clear()
        self._wakeup.set()

    def delay_problem(self) -> str:
        """Return a message if the oldest record is late, else an empty string."""
        seconds = self._oldest_age_seconds()
        late = seconds > LATE_SECONDS
        return f"{self.waiting} records wait, the oldest for {seconds:.0f} s" if late else ""

    async def run(self) -> None:
        """Deliver until cancelled.

        Raises StateError, and SinkLoginRefused at the first login. Other errors of the sink are
        logged and retried.
        """
        async with self._lock:
            backlog = (await self._state.backlogs()).get(self._sink.name)
            self.waiting = backlog.records if backlog else 0
        try:
            while True:
                batch = await self._next_batch()
                if self._started and not batch:
                    await self._wakeup.wait()
                    continue
                refusals = await self._attempt(batch)
                self.attempts += 1
                if refusals is None:
                    await asyncio.sleep(self._backoff.next_delay())
                elif batch:
                    await self._commit_batch(batch, refusals)
        finally:
            await self._close_sink()

    async def _next_batch(self) -> list[Record]:
        """Return the records to deliver next; empty if there are none."""
        self._wakeup.clear()
        while True:
            if not self._buffer and self._has_more:
                await self._load_more()
            if not self._buffer:
                self.idle.set()
                return []
            before = self._wall.now() - self._max_age
            if self._buffer[0][0].created >= before:
                return self._peek_batch()
            await self._expire(before)

    def _peek_batch(self) -> list[Record]:
        batch, size = [], 0
        for record, _ in self._buffer:
            batch.append(record)
            size += len(record.value)
            if len(batch) >= BATCH_RECORDS or size >= BATCH_BYTES:
                break
        return batch

    async def _load_more(self) -> None:
        async with self._lock:
            name = self._sink.name
            records = await self._state.undelivered(name, BATCH_RECORDS, BATCH_BYTES)
            for record in records:
                self._append(record, None)
            if len(records) < BATCH_RECORDS and self._buffered_bytes < BATCH_BYTES:
                self._has_more, self.waiting = False, len(records)

    async def _expire(self, before: int) -> None:
        """Drop records from the front that were created before a time, UTC ms."""
        async with self._lock:
            count, last = await self._state.expire(self._sink.name, before)
            while self._buffer and self._buffer[0][0].sequence <= last:
                self._pop()
            self.waiting -= count
        self._metrics.expired.labels(self._sink.name).inc(count)
        _log.error("records dropped, too old to deliver", sink=self._sink.name, records=count)

    async def _attempt(self, batch: Sequence[Record]) -> Sequence[Refusal] | None:
        """Deliver a batch and return what the sink refused; None if it has to be repeated."""
        try:
            async with asyncio.timeout(DELIVER_TIMEOUT_SECONDS):
                if not self._started:
                    await self._sink.start()
                    self._started = True
                refusals = await self._sink.deliver(batch) if batch else ()
        except asyncio.CancelledError:
            if _is_cancelled():
                raise
            self._on_failure("the sink cancelled its own task")
        except (SinkUnavailable, TimeoutError) as error:
            if isinstance(error, SinkLoginRefused) and not (self._started or self._retry_login):
                raise
            self._on_failure(str(error) or f"no answer in {DELIVER_TIMEOUT_SECONDS:g} s")
        except Exception as error:  # noqa: BLE001 - a faulty sink must not stop the others
            _log.error("sink failed unexpectedly", sink=self._sink.name, exc_info=error)
            self._on_failure(repr(error))
        else:
            self._on_success()
            return refusals
        if _is_cancelled():
            raise asyncio.CancelledError  # the sink replaced it by another error
        return None

    async def _commit_batch(self, batch: Sequence[Record], refusals: Sequence[Refusal]) -> None:
        """Delete a batch from the file and memory; refused records become dead letters."""
        name, now = self._sink.name, self._wall.now()
        letters = []
        for record, why in refusals:
            _log.error("record refused", sink=name, kind=record.kind, key=record.key, why=why)
            if record.kind != "deadletter":  # a refused dead letter would repeat for ever
                series = record.key or None
                letters.append(
                    dead_letter("record", why, record.value, at=now, series=series, sink=name)
                )
        refused = {record.sequence for record, _ in refusals}
        self._metrics.refused.labels(name).inc(len(refused))
        delivered: Counter[str] = Counter()
        async with self._lock:
            added = await self._state.mark_delivered(name, batch[-1].sequence, letters, created=now)
            for _ in batch:
                record, received = self._pop()
                if record.sequence not in refused:
                    delivered[record.kind] += 1
                    if received is not None:
                        seconds = max(0, now - received) / 1000
                        self._metrics.received_to_published.labels(name).observe(seconds)
            self.waiting -= len(batch)
            for record in added:
                self.enqueue(record, None)
        for kind, count in delivered.items():
            self._metrics.delivered.labels(name, kind).inc(count)

    def _on_failure(self, why: str) -> None:
        self._metrics.sink_failures.labels(self._sink.name).inc()
        if why != self.problem:
            _log.warning("sink does not deliver, trying again", sink=self._sink.name, why=why)
        self.problem = why

    def _on_success(self) -> None:
        if tries := self._backoff.attempts:
            _log.info("sink delivers", sink=self._sink.name, tries=tries, waiting=self.waiting)
        self._backoff.reset()
        self.problem = ""

    async def _close_sink(self) -> None:
        try:
            async with asyncio.timeout(_CLOSE_TIMEOUT_SECONDS):
                await self._sink.close()
        except Exception as error:  # noqa: BLE001 - the sink is not used any more
            _log.warning("sink not closed cleanly", sink=self._sink.name, why=repr(error))

    def _append(self, record: Record, received: int | None) -> None:
        self._buffer.append((record, received))
        self._buffered_bytes += len(record.value)

    def _pop(self) -> tuple[Record, int | None]:
        first = self._buffer.popleft()
        self._buffered_bytes -= len(first[0].value)
        return first

    def _oldest_age_seconds(self) -> float:
        if not self._buffer:
            return 0.0
        return max(0, self._wall.now() - self._buffer[0][0].created) / 1000


def _is_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
