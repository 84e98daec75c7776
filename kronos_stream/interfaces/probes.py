"""Ready-made probes for the checks of ``kronos-stream doctor``: clock and disk."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Awaitable, Callable, Collection
from concurrent.futures import Future
from errno import EDQUOT, ENOSPC
from pathlib import Path
from tempfile import TemporaryFile
from threading import Thread
from typing import TypeVar

from kronos_stream.interfaces.diagnostics import Finding, Level
from kronos_stream.market.clock import Clock
from kronos_stream.market.series import Series

_T = TypeVar("_T")

_CLOCK_SAMPLES = 3
_WARN_OFFSET_MS = 500
_MAX_OFFSET_MS = 60_000

_TEST_WRITE_BYTES = 65_536
_LOW_SPACE_BYTES, _MIN_SPACE_BYTES = 2**30, 64 * 2**20


async def run_in_thread(work: Callable[[], _T]) -> _T:
    """Return ``work()``, run in a daemon thread: if it hangs, the program can still end."""
    result: Future[_T] = Future()
    result.set_running_or_notify_cancel()

    def run() -> None:
        try:
            result.set_result(work())
        except BaseException as error:  # noqa: BLE001 - raised where it is awaited
            result.set_exception(error)

    Thread(target=run, daemon=True).start()
    return await asyncio.wrap_future(result)


async def compare_clocks(
    fetch_time: Callable[[], Awaitable[int]], clock: Clock, series: Collection[Series]
) -> Finding:
    """Compare the local clock with a venue's; ``series`` are those of the venue.

    fetch_time: returns the venue's time, UTC ms. The sample with the shortest round trip counts.
    """
    samples = []
    for _ in range(_CLOCK_SAMPLES):
        before = clock.now()
        venue_time = await fetch_time()
        after = clock.now()
        samples.append((after - before, (before + after) // 2 - venue_time))
    round_trip, ahead = min(samples)
    uncertainty = round_trip // 2 + 1
    offset, direction = abs(ahead), "ahead of" if ahead > 0 else "behind"
    found = f"our clock is {offset / 1000:g} s {direction} the venue's (±{uncertainty} ms)"
    if offset - uncertainty < _WARN_OFFSET_MS:
        return Finding("ok", found)
    bar_lengths = [one.timeframe.min_milliseconds for one in series]
    remedy = "set the clock by NTP: timedatectl set-ntp true, or chrony"
    if offset - uncertainty < min([_MAX_OFFSET_MS, *bar_lengths]):
        return Finding("warn", f"{found}, so reported latencies are wrong", remedy)
    return Finding(
        "fail", f"{found}: by a bar or more, so forecasts are late or wrongly dated", remedy
    )


def check_disk(file: Path, setting: str) -> Finding:
    """Check that ``file`` can be written and has room to grow; the file itself is not changed.

    setting: the variable that names the file.
    """
    folder = file.parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    make_room = f"make room there, or set {setting} to a file on another disk"
    try:
        with TemporaryFile(dir=folder) as probe:
            probe.write(bytes(_TEST_WRITE_BYTES))
            probe.flush()
            os.fsync(probe.fileno())
        if file.exists():
            with file.open("ab"):
                pass
    except OSError as error:
        if error.errno in {ENOSPC, EDQUOT}:
            return Finding("fail", f"{folder}: the disk is full", make_room)
        remedy = f"make it writable for this user, or set {setting} to a file elsewhere"
        return Finding("fail", f"{file}: cannot be written: {error.strerror}", remedy)
    free = shutil.disk_usage(folder).free
    if free >= _LOW_SPACE_BYTES:
        return Finding("ok", f"{file}: can be written; {free / 2**30:.1f} GiB free")
    level: Level = "fail" if free < _MIN_SPACE_BYTES else "warn"
    return Finding(level, f"{file}: {free / 2**20:.0f} MiB free", make_room)
