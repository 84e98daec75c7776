"""What ``kronos-stream doctor`` asks, and what it is answered.

A source or a sink brings checks of its own by having a method ``checks``; nothing else is asked of
it. A check changes nothing that a running daemon depends on, and ends within its time.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from errno import EDQUOT, ENOSPC
from pathlib import Path
from tempfile import TemporaryFile
from threading import Thread
from typing import Literal, NamedTuple, Protocol, TypeVar, runtime_checkable

from kronos_stream.market.clock import Clock
from kronos_stream.market.series import Series

_T = TypeVar("_T")

Level = Literal["ok", "warn", "fail"]


class Finding(NamedTuple):
    """What a check has found."""

    level: Level
    """warn: it works, and will not for long or not well; fail: it does not."""
    found: str
    """What is so, in one clause."""
    remedy: str = ""
    """What to do about it; empty where all is well."""


class Check(NamedTuple):
    """Something to look at."""

    name: str
    """Of what; two words at most."""
    run: Callable[[], Awaitable[Sequence[Finding]]]
    """Finds at least one thing. What it raises is a failure, and told in its words."""
    seconds: float = 15.0
    """How long it may take."""


@runtime_checkable
class CheckedSource(Protocol):
    """A source that can be looked over."""

    def checks(self, series: Collection[Series]) -> Sequence[Check]:
        """What it hangs on that ``series``, all of its venue, can be followed."""


@runtime_checkable
class CheckedSink(Protocol):
    """A sink that can be looked over."""

    def checks(self) -> Sequence[Check]:
        """What delivery hangs on. Nothing is delivered by it."""


@runtime_checkable
class CheckedFeed(Protocol):
    """What carries candles between roles, where it can be looked over."""

    def checks(self, *, writes: bool) -> Sequence[Check]:
        """Whether what it reads is there, and ours to read, or to write to."""


class Result(NamedTuple):
    """A finding, and of what."""

    name: str
    finding: Finding


async def run_checks(
    checks: Sequence[Check], on_start: Callable[[str], None] = lambda _: None
) -> AsyncIterator[Result]:
    """What each finds, one after the other; none can keep the next from being asked.

    begins: told the name of each that begins.
    """
    for check in checks:
        on_start(check.name)
        for finding in await _findings(check):
            yield Result(check.name, finding)


async def _findings(check: Check) -> Sequence[Finding]:
    try:
        async with asyncio.timeout(check.seconds):
            return await check.run()
    except TimeoutError:
        return [Finding("fail", f"no answer within {check.seconds:g} s", _TIMEOUT_REMEDY)]
    except Exception as error:  # noqa: BLE001 - whatever it was, the other checks are still of use
        return [Finding("fail", str(error) or type(error).__name__)]


_TIMEOUT_REMEDY = (
    "see whether it is there, whether a firewall is between, or whether this machine is busy"
)


async def run_in_thread(work: Callable[[], _T]) -> _T:
    """What ``work`` returns; a disk or a library that hangs holds up neither us nor our end."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[_T] = loop.create_future()

    def tell(call: Callable[[_T], None], what: _T) -> None:
        if not done.done():
            call(what)

    def run() -> None:
        try:
            result = work()
        except BaseException as error:  # noqa: BLE001 - raised where it is waited for
            _call_soon(loop, tell, done.set_exception, error)
        else:
            _call_soon(loop, tell, done.set_result, result)

    Thread(target=run, daemon=True).start()
    return await done


def _call_soon(
    loop: asyncio.AbstractEventLoop, tell: Callable[..., None], *arguments: object
) -> None:
    try:
        loop.call_soon_threadsafe(tell, *arguments)
    except RuntimeError:  # the loop has ended; nobody waits any more
        return


_CLOCK_SAMPLES = 3
_WARN_OFFSET_MS = 500
_MAX_OFFSET_MS = 60_000


async def compare_clocks(
    fetch_time: Callable[[], Awaitable[int]], clock: Clock, series: Collection[Series]
) -> Finding:
    """How far our clock is from the one that ``ask`` asks, UTC ms; ``series`` hang on it.

    The quickest of a few answers counts: it tells best.
    """
    measured = []
    for _ in range(_CLOCK_SAMPLES):
        before = clock.now()
        there = await fetch_time()
        after = clock.now()
        measured.append((after - before, (before + after) // 2 - there))
    trip, ahead = min(measured)
    doubt = trip // 2 + 1
    apart, where = abs(ahead), "ahead of" if ahead > 0 else "behind"
    found = f"our clock is {apart / 1000:g} s {where} the venue's (±{doubt} ms)"
    if apart - doubt < _WARN_OFFSET_MS:
        return Finding("ok", found)
    lengths = [one.timeframe.milliseconds or _MAX_OFFSET_MS for one in series]
    cure = "set the clock by NTP: timedatectl set-ntp true, or chrony"
    if apart - doubt < min([_MAX_OFFSET_MS, *lengths]):
        return Finding("warn", f"{found}, so latencies are told wrong", cure)
    return Finding(
        "fail", f"{found}: by a bar or more, so forecasts are late or wrongly dated", cure
    )


_TEST_WRITE_BYTES = 65_536
_LOW_SPACE_BYTES, _MIN_SPACE_BYTES = 2**30, 64 * 2**20


def check_disk(file: Path, setting: str) -> Finding:
    """Whether ``file`` can be written to, and for how long. Tried beside it; it stays untouched.

    setting: the variable that says where it is.
    """
    folder = file.parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        with TemporaryFile(dir=folder) as tried:
            tried.write(bytes(_TEST_WRITE_BYTES))
            tried.flush()
            os.fsync(tried.fileno())
        if file.exists():
            with file.open("ab"):
                pass
    except OSError as error:
        if error.errno in {ENOSPC, EDQUOT}:
            return Finding("fail", f"{folder}: the disk is full", _free_space_remedy(setting))
        cure = f"make it writable for this user, or set {setting} to a file elsewhere"
        return Finding("fail", f"{file}: cannot be written: {error.strerror}", cure)
    free = shutil.disk_usage(folder).free
    found = f"{file}: can be written; {free / 2**30:.1f} GiB free"
    if free >= _LOW_SPACE_BYTES:
        return Finding("ok", found)
    found = f"{file}: {free / 2**20:.0f} MiB free"
    return Finding(
        "fail" if free < _MIN_SPACE_BYTES else "warn", found, _free_space_remedy(setting)
    )


def _free_space_remedy(setting: str) -> str:
    return f"make room there, or set {setting} to a file on another disk"
