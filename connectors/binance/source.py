"""Binance as a source: sockets in shards, history by REST."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from random import Random

import structlog

from kronos_connectors.binance.frames import Answer, FrameError, Kline, Shutdown, decode
from kronos_connectors.binance.link import Link
from kronos_connectors.binance.options import BinanceOptions
from kronos_connectors.binance.rest import Rest
from kronos_connectors.binance.session import Session
from kronos_connectors.binance.symbols import Listing, is_futures
from kronos_stream.market.candle import Candle, Update
from kronos_stream.market.clock import Clock
from kronos_stream.market.series import Series
from kronos_stream.market.source import Intake, SourceError, Traits, VenueRefused

_log = structlog.get_logger()

_SHORTEST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.5, 30.0
_CONNECTIONS, _CONNECTION_SECONDS = 250, 300.0
"""Attempts in five minutes; the venue allows 300."""

_LOOK_SECONDS = 1.0
"""How often the age of a socket is looked at."""

_OVERLAP_SECONDS = 15.0
"""How long an old socket goes on at most while its successor subscribes."""


class BinanceSource:
    """Klines of spot markets and USD-M perpetuals."""

    venue = "binance"
    traits = Traits(push_seconds=2.0, grace_seconds=2.0, fills_empty=True)

    def __init__(self, options: BinanceOptions, clock: Clock, random: Random) -> None:
        self._options, self._clock, self._random = options, clock, random
        self._rest = {f: Rest(options, clock, futures=f) for f in (False, True)}
        self._listings: dict[bool, Listing] = {}
        self._series: frozenset[Series] = frozenset()
        self._streams: dict[bool, dict[tuple[str, str], Series]] = {False: {}, True: {}}
        self._changed = asyncio.Event()
        self._attempts: deque[float] = deque(maxlen=_CONNECTIONS)

    async def unknown(self, series: Collection[Series]) -> Mapping[Series, str]:
        found = {}
        for one in series:
            problem = (await self._listing(is_futures(one))).problem(one)
            if problem is not None:
                found[one] = problem
        if found:
            self._listings.clear()  # what is listed may change: ask anew next time
        return found

    def follow(self, series: Collection[Series]) -> None:
        self._series = frozenset(series)
        self._changed.set()

    async def history(self, series: Series, start: int, end: int) -> Sequence[Candle]:
        futures = is_futures(series)
        return await self._rest[futures].klines(series, await self._name(series), start, end)

    async def close(self) -> None:
        for rest in self._rest.values():
            await rest.close()

    async def run(self, intake: Intake) -> None:
        shards: list[_Shard] = []
        async with asyncio.TaskGroup() as tasks:
            while True:
                self._changed.clear()
                for futures, streams in (await self._wanted()).items():
                    ours = [shard for shard in shards if shard.futures is futures]
                    for share in _shares(streams, ours, self._options.streams_per_connection):
                        shard = _Shard(self, intake, futures=futures)
                        shard.want(share)
                        shards.append(shard)
                        tasks.create_task(shard.run())
                await self._changed.wait()

    async def connect(self, intake: Intake, *, futures: bool) -> Link:
        """A new socket, once the venue's limit on them allows. Raises SourceError."""
        loop = asyncio.get_running_loop()
        if len(self._attempts) == _CONNECTIONS:
            await asyncio.sleep(max(0.0, self._attempts[0] + _CONNECTION_SECONDS - loop.time()))
        self._attempts.append(loop.time())
        options = self._options
        base = options.futures_ws_url if futures else options.ws_url

        def session(now: float) -> Session:
            # Not all sockets of a fleet at the same moment.
            life = options.lifetime_seconds * (1 - 0.1 * self._random.random())
            return Session(now, stall_seconds=options.stall_seconds, lifetime_seconds=life)

        def frame(session: Session, content: str | bytes) -> None:
            self._frame(intake, session, content, futures=futures)

        url = f"{base.rstrip('/')}/stream"
        return await Link.open(url, session, frame, options.timeout_seconds)

    def pause(self, tries: int) -> float:
        """Seconds to wait after so many failures in a row."""
        most = min(_SHORTEST_PAUSE_SECONDS * 2 ** min(tries, 10), _LONGEST_PAUSE_SECONDS)
        return float(most * (0.5 + self._random.random() / 2))

    def _frame(
        self, intake: Intake, session: Session, content: str | bytes, *, futures: bool
    ) -> None:
        try:
            told = decode(content, self._streams[futures])
        except FrameError as error:
            raw = content.encode(errors="replace") if isinstance(content, str) else content
            intake.reject(error.series, str(error), raw)
            return
        if type(told) is Kline:
            update = Update(told.series, told.candle, told.closed, self._clock.now())
            intake.update(update)
        elif type(told) is Answer:
            session.answered(told)
        elif type(told) is Shutdown:
            intake.note("shutdown told")
            session.shut_down()
        else:
            intake.note("other frame")

    async def _wanted(self) -> dict[bool, set[str]]:
        """Streams by market, of the series that are listed; also sets what frames are read by."""
        wanted: dict[bool, set[str]] = {False: set(), True: set()}
        streams: dict[bool, dict[tuple[str, str], Series]] = {False: {}, True: {}}
        for series in self._series:
            futures, interval = is_futures(series), str(series.timeframe)
            name = (await self._listed(futures)).name(series)
            if name is None:
                _log.warning("not listed, so not followed", series=series.name)
                continue
            streams[futures][name, interval] = series
            wanted[futures].add(f"{name.lower()}@kline_{interval}")
        self._streams = streams
        return wanted

    async def _listed(self, futures: bool) -> Listing:  # noqa: FBT001 - which of the two markets
        """The listing, for as long as it takes to get it."""
        tries = 0
        while True:
            try:
                return await self._listing(futures)
            except VenueRefused:
                raise
            except SourceError as error:
                _log.warning("symbols cannot be had", venue=self.venue, why=str(error))
                await self._clock.sleep(max(error.retry_after, self.pause(tries)))
                tries += 1

    async def _listing(self, futures: bool) -> Listing:  # noqa: FBT001
        if futures not in self._listings:
            infos = await self._rest[futures].symbols()
            self._listings[futures] = Listing(infos, futures=futures)
        return self._listings[futures]

    async def _name(self, series: Series) -> str:
        name = (await self._listing(is_futures(series))).name(series)
        if name is None:
            raise SourceError(f"binance does not list {series.symbol}")
        return name


class _Shard:
    """Streams that share a socket, and its successors."""

    def __init__(self, source: BinanceSource, intake: Intake, *, futures: bool) -> None:
        self.futures = futures
        self.streams: set[str] = set()
        self._source, self._intake = source, intake
        self._links: set[Link] = set()

    def want(self, streams: set[str]) -> None:
        """Follow exactly these, now and on every later socket."""
        self.streams = streams
        for link in self._links:
            link.session.want(streams)
            link.poke.set()

    async def run(self) -> None:
        """Keep a socket up; one that grows old is relieved before it goes."""
        current: asyncio.Task[str] | None = None
        try:
            while True:
                link = await self._connected()
                following = asyncio.create_task(self._work(link))
                if current is not None:
                    await self._relieve(current, link, following)
                current = following
                while not current.done() and not link.session.tired(_now()):
                    await asyncio.wait((current,), timeout=_LOOK_SECONDS)
        finally:
            if current is not None:
                await _end(current)

    async def _connected(self) -> Link:
        tries = 0
        while True:
            try:
                link = await self._source.connect(self._intake, futures=self.futures)
            except VenueRefused:
                raise
            except SourceError as error:
                self._intake.note("not connected")
                _log.warning("no connection", venue=self._source.venue, why=str(error))
                await asyncio.sleep(self._source.pause(tries))
                tries += 1
            else:
                self._intake.note("connected")
                return link

    async def _work(self, link: Link) -> str:
        self._links.add(link)
        link.session.want(self.streams)
        try:
            why = await link.run()
        finally:
            self._links.discard(link)
        self._intake.note("lost")
        _log.info("connection lost", venue=self._source.venue, why=why, streams=len(self.streams))
        # One that does not last is not opened again at once.
        await asyncio.sleep(self._source.pause(0))
        return why

    async def _relieve(
        self, old: asyncio.Task[str], link: Link, following: asyncio.Task[str]
    ) -> None:
        """End the old socket once the new one hears all, or after a while."""
        until = _now() + _OVERLAP_SECONDS
        while not (old.done() or following.done() or link.session.live or _now() >= until):  # noqa: ASYNC110
            await asyncio.sleep(_LOOK_SECONDS / 4)
        await _end(old)


def _now() -> float:
    return asyncio.get_running_loop().time()


async def _end(task: asyncio.Task[str]) -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


def _shares(streams: set[str], shards: Sequence[_Shard], room: int) -> Iterator[set[str]]:
    """Spread ``streams``: those followed stay where they are; yields shares for new shards."""
    new = set(streams)
    for shard in shards:
        new -= shard.streams
    for shard in shards:
        kept = shard.streams & streams
        added = set(sorted(new)[: room - len(kept)])
        new -= added
        shard.want(kept | added)
    left = sorted(new)
    for first in range(0, len(left), room):
        yield set(left[first : first + room])


def build(options: BinanceOptions, clock: Clock, random: Random) -> BinanceSource:
    """A source; it connects when it runs."""
    return BinanceSource(options, clock, random)
