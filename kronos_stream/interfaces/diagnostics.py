"""Checks that connectors offer to ``kronos-stream doctor``.

A source, sink or feed offers checks by having a method ``checks``; nothing else is required of it.
A check changes nothing that a running daemon depends on, and ends within its time limit.
:mod:`kronos_stream.interfaces.probes` has ready-made ones.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from typing import Literal, NamedTuple, Protocol, runtime_checkable

from kronos_stream.market.series import Series

Level = Literal["ok", "warn", "fail"]

_TIMEOUT_REMEDY = (
    "check that it is running, that no firewall is in between, and that this machine is not busy"
)


class Finding(NamedTuple):
    """Result of a check."""

    level: Level
    """warn: works, but badly or not for long; fail: does not work."""
    found: str
    """The observation, one clause."""
    remedy: str = ""
    """Instruction to repair it; empty if all is well."""


class Check(NamedTuple):
    """A check to run."""

    name: str
    """Subject of the check, two words at most."""
    run: Callable[[], Awaitable[Sequence[Finding]]]
    """Returns at least one finding. An exception becomes a failure with its message."""
    seconds: float = 15.0
    """Time limit."""


@runtime_checkable
class CheckedSource(Protocol):
    """A source with checks."""

    def checks(self, series: Collection[Series]) -> Sequence[Check]:
        """Checks of all that subscribing to ``series``, all of its venue, depends on."""


@runtime_checkable
class CheckedSink(Protocol):
    """A sink with checks."""

    def checks(self) -> Sequence[Check]:
        """Checks of all that delivery depends on. They deliver nothing."""


@runtime_checkable
class CheckedFeed(Protocol):
    """A feed with checks."""

    def checks(self, *, writes: bool) -> Sequence[Check]:
        """Checks that its topics exist and may be read, or with ``writes`` written to."""


class Result(NamedTuple):
    """A finding and the name of its check."""

    name: str
    finding: Finding


async def run_checks(
    checks: Sequence[Check], on_start: Callable[[str], None] = lambda _: None
) -> AsyncIterator[Result]:
    """Run checks one after the other; a failing or hanging one does not stop the next.

    on_start: called with the name of each check that starts.
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
    except Exception as error:  # noqa: BLE001 - the other checks are still useful
        return [Finding("fail", str(error) or type(error).__name__)]
