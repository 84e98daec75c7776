"""Loop that executes the commands of a rotating pool."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from contextlib import suppress
from typing import Any, Generic, NoReturn

from structlog.typing import FilteringBoundLogger

from kronos_connectors._shared.rotating_pool import Close, MemberT, Open, RequestT, RotatingPool
from kronos_stream.interfaces.source import SourceCallbacks


class PoolRunner(ABC, Generic[MemberT, RequestT]):
    """Executes the commands of its pool, and reports the results to it."""

    def __init__(
        self,
        pool: RotatingPool[MemberT, Any, RequestT],
        callbacks: SourceCallbacks,
        log: FilteringBoundLogger,
    ) -> None:
        self._callbacks, self._log = callbacks, log
        self._wakeup = asyncio.Event()
        self._rotating_pool = pool

    async def run(self) -> NoReturn:
        """Run until cancelled. Raises VenueRefused, in an exception group."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                self._wakeup.clear()
                for command in self._rotating_pool.poll(loop_time()):
                    self._execute(command, tasks)
                with suppress(TimeoutError):
                    async with asyncio.timeout_at(self._rotating_pool.next_wakeup):
                        await self._wakeup.wait()

    def _execute(
        self, command: Open[MemberT] | Close[MemberT] | RequestT, tasks: asyncio.TaskGroup
    ) -> None:
        if isinstance(command, Open):
            self._open(command.member, tasks)
        elif isinstance(command, Close):
            if command.reason:
                self._callbacks.count_event("given up")
                self._log.info("connection given up", why=command.reason)
            self._close(command.member, tasks)
        else:
            self._request(command, tasks)

    def _report_lost(
        self, member: MemberT, why: str, retry_after: float = 0.0, *, opened: bool = True
    ) -> None:
        self._rotating_pool.on_lost(member, loop_time(), retry_after)
        self._wakeup.set()
        self._callbacks.count_event("lost" if opened else "not connected")
        self._log.warning("connection lost" if opened else "cannot connect", why=why)

    @abstractmethod
    def _open(self, member: MemberT, tasks: asyncio.TaskGroup) -> None: ...

    @abstractmethod
    def _request(self, request: RequestT, tasks: asyncio.TaskGroup) -> None: ...

    @abstractmethod
    def _close(self, member: MemberT, tasks: asyncio.TaskGroup) -> None: ...


def loop_time() -> float:
    """Seconds of the running event loop's clock."""
    return asyncio.get_running_loop().time()
